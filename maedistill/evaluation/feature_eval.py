"""Evaluation of frozen features for the command line: kNN or a linear probe on any network, on one process or many.

ProbeSpec -> Network with a `Backbone`, two ShardIndex -> features of both, once -> lines on stdout, JSON
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.patterns import Split, describe_shards
from maedistill.data.shards.scan import USUAL, Members
from maedistill.errors import ConfigError, DataError, NumericsError
from maedistill.evaluation.context import EvalContext, finish, metadata, print_data, print_main, print_network
from maedistill.evaluation.features import Features, extract_features
from maedistill.evaluation.knn import knn_counts
from maedistill.evaluation.linear_probe import ProbeRecipe, fit_heads, score_heads
from maedistill.processes import distributed
from maedistill.report.formatting import KNN_CAVEAT, percent
from maedistill.weights.backbone import Backbone, Pool, open_backbone


@dataclass(frozen=True)
class ProbeSpec:
    """Which features to evaluate, and the training and validation shards. crop: overrides the network's own."""

    model: str
    train: str
    val: str
    train_index: str | None = None
    val_index: str | None = None
    weights: str = "model"
    block: int | None = None
    pool: Pool = "mean"
    image_size: int | None = None
    members: Members = USUAL
    exif: str | None = None
    crop: float | None = None


def score_knn(
    spec: ProbeSpec, context: EvalContext, *, ks: Sequence[int], temperature: float, file: Path | None
) -> dict[str, Any]:
    """Print and return the accuracy of the vote of the k nearest training images, for each k. Collective.

    file: for the result as JSON. Raises subclasses of UserError.
    """
    train, val, result = _compute_features(spec, context, least=max(ks), reason=f"--k {max(ks)}")
    counts = knn_counts(train, val, ks=ks, temperature=temperature, device=context.device)
    images, scores = len(val[1]), []
    for k, count in zip(ks, counts, strict=True):
        print_main("knn", f"k {k}: {percent(count, images)}")
        scores.append({"k": k, "top1": count / images, "top1_correct": count, "images": images})
    print_main("warning", KNN_CAVEAT)
    return finish(result | {"temperature": temperature, "knn": scores}, file)


def score_probe(
    spec: ProbeSpec, context: EvalContext, recipe: ProbeRecipe, *, rates: Sequence[float], file: Path | None
) -> dict[str, Any]:
    """Print and return the accuracy of a linear classifier on frozen features, for each learning rate. Collective.

    The learning rates are divided among the processes. recipe.batch is an upper limit. file: for the result as JSON.
    Raises subclasses of UserError.
    """
    (rows, labels), val, result = _compute_features(spec, context, least=2, reason="BatchNorm")
    recipe = recipe.fit_batch(len(rows))
    recipe_text = f"{recipe.optimizer}, {recipe.epochs} epochs, batch {recipe.batch:,}"
    print_main("probe", f"{recipe_text}, learning rates per 256 images")
    num_classes, rank_scores = int(torch.cat([labels, val[1]]).max()) + 1, []
    if rank_rates := list(rates)[distributed.rank() :: distributed.world_size()]:
        heads = fit_heads(rows, labels, recipe, rates=rank_rates, num_classes=num_classes, device=context.device)
        rank_scores = [replace(score, bad_images=result["val_bad_images"]) for score in score_heads(heads, *val)]
    scores = sorted(itertools.chain(*distributed.gather_objects(rank_scores)), key=lambda score: score.lr)
    for score in scores:
        print_main(f"lr {score.lr:g}", score.line())
    finite = [score for score in scores if math.isfinite(score.loss)]
    if not finite:
        raise NumericsError("the probe diverged at every learning rate", "name smaller ones with --lr")
    best = max(finite, key=lambda score: (score.top1, -score.lr))
    selection = f", chosen on the same images from {len(scores)} rates" if len(scores) > 1 else ""
    selection += " (the largest: try larger ones, too)" if selection and best == scores[-1] else ""
    print_main("result", f"{best.line()}, at lr {best.lr:g}{selection}")
    result |= {"probe": asdict(recipe), "rates": [score.metrics() for score in scores]} | best.metrics()
    return finish(result, file)


def open_pair(spec: ProbeSpec, *, exif: str = "ignore") -> tuple[ShardIndex, ShardIndex]:
    """Open the training and the validation shards. Collective.

    Raises DataError if either has no labels, or if the validation shards have classes missing from the training shards,
    or differently named ones.
    """
    indexes = []
    named: tuple[tuple[str, str | None, Split], ...]
    named = ((spec.train, spec.train_index, "train"), (spec.val, spec.val_index, "val"))
    for shards, file, split in named:
        open_images = partial(open_index, members=spec.members, apply_exif=(spec.exif or exif) == "apply")
        index = distributed.main_first(partial(open_images, shards, index=file, split=split))
        index.require_labels()
        indexes.append(index)
    train, val = indexes
    for label, (name, other) in enumerate(zip(train.classes, val.classes, strict=False)):
        if name != other:
            raise DataError(
                f"label {label} is {name!r} in the shards of --train and {other!r} in those of --val",
                "name two parts of one data set, written with the same classes (maedistill shards)",
            )
    unknown = np.setdiff1d(val.labels, train.labels)
    if len(unknown):
        raise DataError(
            f"{len(unknown):,} of the classes in {spec.val} have no image in {spec.train}, first label {unknown[0]}",
            "name shards with the same classes: --train and --val are two parts of one data set",
        )
    return train, val


def _compute_features(
    spec: ProbeSpec, context: EvalContext, *, least: int, reason: str
) -> tuple[Features, Features, dict[str, Any]]:
    """Return the features of the training and validation images, and the entries for a result file; describe them.

    Raises ConfigError unless there are `least` training images, which `reason` needs.
    """
    network = distributed.main_first(
        partial(
            open_backbone,
            spec.model,
            weights=spec.weights,
            image_size=spec.image_size,
            block=spec.block,
            pool=spec.pool,
        )
    )
    network, backbone = replace(network, crop=spec.crop or network.crop), network.module
    assert isinstance(backbone, Backbone)
    train, val = open_pair(spec, exif=network.exif)
    print_network("model", network)
    print_data("train", train, describe_shards(spec.train, train.shards))
    print_data("val", val, describe_shards(spec.val, val.shards))
    _require(least, len(train), spec, reason)
    train_features, val_features = (extract_features(network, index, context) for index in (train, val))
    _require(least, len(train_features[1]), spec, reason)  # without those that cannot be decoded
    print_main("features", f"{backbone.describe()}, {train_features[0].shape[1]} wide")
    result = metadata(network, context) | {"block": backbone.block, "pool": backbone.pool}
    result |= {"train_fingerprint": train.fingerprint(), "val_fingerprint": val.fingerprint()}
    result |= {"train_bad_images": len(train) - len(train_features[1])}
    result |= {"val_bad_images": len(val) - len(val_features[1])}
    return train_features, val_features, result


def _require(least: int, count: int, spec: ProbeSpec, reason: str) -> None:
    if count < least:
        raise ConfigError(
            f"{reason} needs {least:,} training images, but {spec.train} holds {count:,}",
            "name more training shards, or a smaller --k",
        )
