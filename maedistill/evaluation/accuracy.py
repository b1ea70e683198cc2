"""Accuracy of a classifier on a set of shards. Each image counts exactly once, on any number of processes.

EvaluationImages -> full_pass -> logits -> label, best classes, loss, confidence of each image -> Evaluation

n images   b batch   s image side   C classes   k best classes stored per image, min(5, C)
"""

import csv
import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maedistill.data.loading.evaluation import PADDING, EvaluationImages
from maedistill.data.loading.workers import TIMEOUT_SECONDS
from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.reader import sample_name
from maedistill.errors import DataError, NumericsError
from maedistill.evaluation.full_pass import Predictor, evaluation_mode, full_pass
from maedistill.runs.records import write_text

_KEPT = 5  # best classes stored per image


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A classifier's predictions for each image, on the CPU, sorted by id. Counts are integers, never averages."""

    ids: Tensor  # int64 [n], ascending
    labels: Tensor  # int64 [n]
    predictions: Tensor  # int64 [n, k], best first
    losses: Tensor  # float32 [n], cross-entropy
    confidences: Tensor  # float32 [n], the probability of the best class

    @property
    def images(self) -> int:
        """Return the number of images."""
        return len(self.ids)

    @property
    def top1(self) -> int:
        """Count the images whose label is the best class."""
        return int((self.predictions[:, 0] == self.labels).sum())

    @property
    def top5(self) -> int:
        """Count the images whose label is among the five best classes."""
        return int((self.predictions == self.labels[:, None]).sum())

    @property
    def loss(self) -> float:
        """Return the mean cross-entropy. The sum is exact and rounded once, so it does not depend on the order."""
        return math.fsum(self.losses.tolist()) / self.images

    def line(self) -> str:
        """Format the result as one line."""
        parts = [
            f"{name} {100 * count / self.images:.2f} % ({count} of {self.images})"
            for name, count in (("top-1", self.top1), ("top-5", self.top5))
        ]
        return f"{', '.join(parts)}, loss {self.loss:.4f}"

    def facts(self) -> dict[str, float]:
        """Return the entries for a result file. top1 and top5 are counts."""
        return {"images": self.images, "top1": self.top1, "top5": self.top5, "loss": self.loss}


def evaluate(
    network: nn.Module,
    images: EvaluationImages,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch: int,
    workers: int,
    device: torch.device,
    precision: str = "fp32",
    columns: Tensor | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Evaluation:
    """Evaluate `network` (on `device`; normalised [b, 3, s, s] -> logits [b, C]) once on each image. Collective.

    batch: images per forward pass and rank. precision, columns: as in `Predictor`; with columns, a label is an index
    into them. timeout_seconds: as in `load_batches`. The train/eval mode of the network is restored. Raises DataError
    if an image has no label, a label outside the network's classes, or cannot be decoded; NumericsError if a loss is
    not finite.
    """
    images.index.require_labels()
    viewer = Predictor(network, mean=mean, std=std, device=device, precision=precision, columns=columns)

    @functools.cache
    def check(num_classes: int) -> None:
        require_known_classes(images, num_classes)

    def look(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = viewer(pixels)  # [b, C]
        check(logits.shape[1])
        return judge(logits, labels)

    with evaluation_mode(network):
        found = full_pass(images, look, batch=batch, workers=workers, device=device, timeout_seconds=timeout_seconds)
    return evaluation_of(*found, index=images.index)


def judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Score a batch per image: label and best classes, int64 [b, 1 + k]; loss and confidence, float [b, 2]."""
    order = logits.sort(dim=1, descending=True, stable=True).indices  # [b, C]; of equal logits the lower class is first
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=PADDING)  # [b]
    classes = torch.cat([labels[:, None], order[:, :_KEPT]], dim=1)  # [b, 1 + k]
    return classes, torch.stack([losses, logits.softmax(1).amax(1)], dim=1)


def evaluation_of(ids: Tensor, classes: Tensor, numbers: Tensor, *, index: ShardIndex) -> Evaluation:
    """Build an Evaluation from the outputs of `judge`, sorted by id. Raises NumericsError if a loss is not finite."""
    losses, confidences = numbers.unbind(1)
    broken = ~losses.isfinite()  # [n]
    if broken.any():
        raise NumericsError(
            f"the loss of {int(broken.sum())} of {len(ids)} images is not finite, first "
            f"{sample_name(index, int(ids[broken][0]))}",
            "evaluate in precision fp32; if that does not help, the weights are broken: take an earlier checkpoint",
        )
    return Evaluation(ids=ids, labels=classes[:, 0], predictions=classes[:, 1:], losses=losses, confidences=confidences)


def require_known_classes(images: EvaluationImages, num_classes: int) -> None:
    """Raise DataError if a label is not a class of the network, since every count would then be wrong.

    Every rank checks all labels, so that all ranks raise together.
    """
    labels = images.index.labels[images.samples.numpy()]  # [n]
    unknown = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(unknown):
        i = int(images.samples[unknown[0]])
        raise DataError(
            f"the model has {num_classes} classes, 0 to {num_classes - 1}, but {len(unknown)} of {len(labels)} images "
            f"have other labels, first {sample_name(images.index, i)} with {images.index.labels[i]}",
            "use shards with the classes that the model was trained on, or fine-tune it on these (tools/finetune.py)",
        )


def write_predictions(path: Path, evaluation: Evaluation, index: ShardIndex) -> None:
    """Write a CSV file atomically: id, shard, key, label, loss, the best classes, and class names if known."""
    best = [f"top{place + 1}" for place in range(evaluation.predictions.shape[1])]
    names = dict(enumerate(index.classes))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", "shard", "key", "label", "loss", *best, *(["label_name", "top1_name"] if names else [])])
    columns = (evaluation.ids, evaluation.labels, evaluation.losses, evaluation.predictions)
    for i, label, loss, classes in zip(*(column.tolist() for column in columns), strict=True):
        shard = Path(index.shards[index.shard_of(i)]).name
        named = [names.get(label, ""), names.get(classes[0], "")] if names else []
        loss_text = f"{loss:.9g}"  # 9 digits represent a float32 exactly
        table.writerow([i, shard, index.key(i), label, loss_text, *classes, *named])
    write_text(Path(path), text.getvalue())
