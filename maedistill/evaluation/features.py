"""Features of every image of a set of shards, computed once: the input of kNN and of the linear probe.

MODEL, TRAIN, VAL -> open_pair -> two sets of shards with the same classes
Network with a `Backbone`, ShardIndex -> extract_features -> Features, on the CPU of every rank

Every rank holds all rows: 4 n D bytes, 3.9 GB for ImageNet's training images at D = 768.

n images   D width
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maedistill.data.loading.evaluation import EvaluationImages
from maedistill.data.shards.index import ShardIndex, open_index
from maedistill.errors import DataError, NumericsError
from maedistill.evaluation.full_pass import evaluation_mode, full_pass
from maedistill.evaluation.setting import EvalContext
from maedistill.processes import distributed
from maedistill.weights.network import Network


@dataclass(frozen=True, eq=False)
class Features:
    """Features and labels, sorted by sample id."""

    rows: Tensor  # float32 [n, D]
    labels: Tensor  # int64 [n]


def extract_features(network: Network, index: ShardIndex, setting: EvalContext) -> Features:
    """Compute the features of each image once with the network's `Backbone`. Collective.

    Raises DataError for an image that has no label or cannot be decoded, NumericsError if a feature is not finite.
    """
    viewer = setting.view(network)

    def look(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return viewer(pixels), labels

    images = EvaluationImages(index, torch.arange(len(index)), network.transform())
    with evaluation_mode(viewer.network):
        _, rows, labels = full_pass(images, look, **setting.loop)
    if broken := int((~rows.isfinite().all(1)).sum()):
        raise NumericsError(
            f"the features of {broken} of {len(rows)} images are not finite",
            "use --precision fp32; if that does not help, the weights are broken: take an earlier checkpoint",
        )
    return Features(rows, labels)


def open_pair(train: str, val: str, *, train_index: str | None, val_index: str | None) -> tuple[ShardIndex, ShardIndex]:
    """Open the training and the validation shards. Collective.

    Raises DataError if either has no images or no labels, or if `val` has classes missing from `train`, or differently
    named ones.
    """
    learnt, judged = (
        distributed.main_first(lambda shards=shards, file=file: open_index(shards, index=file))
        for shards, file in ((train, train_index), (val, val_index))
    )
    for index, shards in ((learnt, train), (judged, val)):
        if not len(index):
            raise DataError(f"{shards} holds no image", "name shards that hold labelled images")
        index.require_labels()
    if learnt.classes and judged.classes:
        _require_same_names(learnt.classes, judged.classes)
    unknown = np.setdiff1d(judged.labels, learnt.labels)
    if len(unknown):
        raise DataError(
            f"{len(unknown):,} of the classes in {val} have no image in {train}, first label {unknown[0]}",
            "name shards with the same classes: --train and --val are two parts of one data set",
        )
    return learnt, judged


def _require_same_names(learnt: tuple[str, ...], judged: tuple[str, ...]) -> None:
    other = next((i for i, names in enumerate(zip(learnt, judged, strict=False)) if names[0] != names[1]), None)
    if other is not None:
        raise DataError(
            f"label {other} is {learnt[other]!r} in the shards of --train and {judged[other]!r} in those of --val",
            "name two parts of one data set, written with the same classes (tools/make_shards.py)",
        )
