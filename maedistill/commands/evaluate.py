"""Evaluates a network on labelled shards: every image exactly once."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from maedistill.commands.evaluate_arguments import FILES, parse_exits, parse_features, parse_score
from maedistill.durable import require_local
from maedistill.errors import ConfigError

if TYPE_CHECKING:
    from maedistill.evaluation.context import EvalContext


def main() -> None:
    """Check the command line before torch is imported."""
    words = sys.argv[2:]
    kind = words[0] if words[:1] in (["knn"], ["probe"], ["exits"]) else "score"
    if kind == "score":
        arguments, start = parse_score(words), start_score
    elif kind == "exits":
        arguments, start = parse_exits(words[1:]), start_exits
    else:
        arguments, start = parse_features(kind, words[1:]), start_features
    require_writable({name: getattr(arguments, name, None) for name in (*FILES, "picture")})
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see stage.py
    start(arguments)


def start_score(arguments: argparse.Namespace) -> None:
    """Evaluate a classifier and report its scorecard."""
    from maedistill.data.shards.scan import Members
    from maedistill.evaluation.scorecard import score

    score(
        arguments.model,
        arguments.shards,
        open_context(arguments),
        index_file=arguments.index,
        weights=arguments.weights,
        exit=arguments.exit,
        peer=arguments.peer,
        image_size=arguments.image_size,
        crop=arguments.crop,
        test_size=arguments.test_size,
        members=Members(arguments.image_key, arguments.label_key),
        exif=arguments.exif,
        against=arguments.against,
        subset=arguments.subset,
        real=arguments.real,
        bins=arguments.bins,
        latency=not arguments.no_latency,
        files={name: getattr(arguments, name) for name in FILES},
    )


def start_features(arguments: argparse.Namespace) -> None:
    """Evaluate frozen features by kNN or by a linear probe."""
    from maedistill.data.shards.scan import Members
    from maedistill.evaluation.feature_eval import ProbeSpec, score_knn, score_probe
    from maedistill.evaluation.linear_probe import ProbeRecipe

    names = (
        "model",
        "train",
        "val",
        "train_index",
        "val_index",
        "block",
        "pool",
        "image_size",
        "crop",
        "exif",
        "weights",
    )
    members = Members(arguments.image_key, arguments.label_key)
    spec = ProbeSpec(**{name: getattr(arguments, name) for name in names}, members=members)
    context = open_context(arguments)
    if arguments.command == "knn":
        score_knn(spec, context, ks=arguments.k, temperature=arguments.temperature, file=arguments.json)
    else:
        recipe = ProbeRecipe(arguments.epochs, arguments.head_batch, arguments.optimizer)
        score_probe(spec, context, recipe, rates=arguments.lr, file=arguments.json)


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


def open_context(arguments: argparse.Namespace) -> "EvalContext":
    """Join the process group with the settings of the computation."""
    from maedistill.evaluation import context

    return context.open_context(
        batch=arguments.batch,
        workers=arguments.workers,
        threads=arguments.threads,
        precision=arguments.precision,
    )


def require_writable(files: dict[str, Path | None]) -> None:
    """Raise ConfigError for a file that cannot be written or is named twice, before the evaluation starts."""
    named: dict[Path, str] = {}
    for name, file in files.items():
        if file is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        require_local(file, flag)
        if file.is_dir() or not file.parent.is_dir():
            problem = "is a folder" if file.is_dir() else f"cannot be written, {file.parent} is no folder"
            raise ConfigError(f"{flag}: {file} {problem}", "name a file in a folder that exists")
        if (other := named.setdefault(file.resolve(), flag)) != flag:
            raise ConfigError(f"{other} and {flag} both name {file}", "name two files")
