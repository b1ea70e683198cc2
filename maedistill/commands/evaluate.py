"""Evaluate a network on labelled shards: every image exactly once."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from maedistill.commands.arguments import require_writable, spec_of
from maedistill.commands.evaluate_arguments import (
    FILES,
    parse_embed,
    parse_exits,
    parse_features,
    parse_score,
    parse_segment,
)
from maedistill.durable import require_local

if TYPE_CHECKING:
    from maedistill.evaluation.context import EvalContext


Start = Callable[[argparse.Namespace], None]


def main() -> None:
    """Run the command. What is wrong with the command line is said before torch is imported."""
    arguments, start = parse(sys.argv[2:])
    require_writable({name: getattr(arguments, name, None) for name in (*FILES, "picture")})
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see stage.py
    start(arguments)


def parse(words: list[str]) -> tuple[argparse.Namespace, Start]:
    """Read the command line; return what it says and what to start with it."""
    match words:
        case ["knn" | "probe" as kind, *rest]:
            return parse_features(kind, rest), start_features
        case ["embed", *rest]:
            return parse_embed(rest), start_embed
        case ["segment", *rest]:
            return parse_segment(rest), start_segment
        case ["exits", *rest]:
            return parse_exits(rest), start_exits
        case _:
            return parse_score(words), start_score


def start_score(arguments: argparse.Namespace) -> None:
    """Evaluate a classifier and report its scorecard."""
    from maedistill.data.shards.scan import Members
    from maedistill.evaluation.scorecard import ScoreSpec, score

    members = Members(arguments.image_key, arguments.label_key)
    spec = spec_of(ScoreSpec, arguments, members=members, latency=not arguments.no_latency)
    score(spec, open_context(arguments), files={name: getattr(arguments, name) for name in FILES})


def start_features(arguments: argparse.Namespace) -> None:
    """Evaluate frozen features by kNN or by a linear probe."""
    from maedistill.data.shards.scan import Members
    from maedistill.evaluation.feature_eval import ProbeSpec, score_knn, score_probe
    from maedistill.evaluation.linear_probe import ProbeRecipe

    spec = spec_of(ProbeSpec, arguments, members=Members(arguments.image_key, arguments.label_key))
    context = open_context(arguments, fits=arguments.command == "probe")
    if arguments.command == "knn":
        score_knn(spec, context, ks=arguments.k, temperature=arguments.temperature, file=arguments.json)
    else:
        recipe = ProbeRecipe(arguments.epochs, arguments.head_batch, arguments.optimizer)
        score_probe(spec, context, recipe, rates=arguments.lr, file=arguments.json)


def start_embed(arguments: argparse.Namespace) -> None:
    """Write features to disk."""
    from maedistill.data.shards.scan import Members
    from maedistill.evaluation.embed import EmbedSpec, embed

    require_local(arguments.out, "OUT")
    spec = spec_of(EmbedSpec, arguments, members=Members(arguments.image_key, arguments.label_key))
    embed(spec, open_context(arguments))


def start_segment(arguments: argparse.Namespace) -> None:
    """Evaluate frozen patch features by linear segmentation."""
    from maedistill.evaluation.linear_probe import ProbeRecipe
    from maedistill.evaluation.segmentation import SegmentSpec, score_segmentation

    score_segmentation(
        spec_of(SegmentSpec, arguments),
        open_context(arguments, fits=True),
        ProbeRecipe(arguments.epochs, arguments.head_batch, "adamw"),
        rates=arguments.lr,
        picture=arguments.picture,
        file=arguments.json,
    )


def start_exits(arguments: argparse.Namespace) -> None:
    """Evaluate the exits of a run."""
    from maedistill.evaluation.exits import score_exits

    score_exits(
        arguments.model,
        arguments.shards,
        open_context(arguments),
        weights=arguments.weights,
        index_file=arguments.index,
        beside=arguments.beside,
        picture=arguments.picture,
        file=arguments.json,
    )


def open_context(arguments: argparse.Namespace, *, fits: bool = False) -> "EvalContext":
    """Join the process group with the settings of the computation. fits: see `evaluation.context.open_context`."""
    from maedistill.evaluation import context

    return context.open_context(
        batch=arguments.batch,
        workers=arguments.workers,
        threads=arguments.threads,
        precision=arguments.precision,
        fits=fits,
    )
