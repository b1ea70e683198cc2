"""Accuracy of a classifier on a set of shards. Each image counts exactly once, on any number of processes.

EvaluationImages -> full_pass -> logits -> label, best classes, loss, confidence of each image -> Evaluation

n images   b batch   s image side   C classes   k best classes stored per image, min(5, C)
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maedistill.data.loading.evaluation import PADDING, EvaluationImages
from maedistill.data.shards.index import ShardIndex
from maedistill.errors import DataError, NumericsError
from maedistill.escaping import cell
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import Predictor, evaluation_mode, full_pass, left_out
from maedistill.report.formatting import percent
from maedistill.runs.records import write_text

_KEPT = 5  # best classes stored per image


@dataclass(frozen=True)
class TopCounts:
    """Counts of images: all, those whose label is the best class, and those whose label is among the five best."""

    images: int
    top1_correct: int
    top5_correct: int

    @staticmethod
    def of(predictions: Tensor, labels: Tensor) -> "TopCounts":
        """Count predictions int64 [n, k], best first, for labels int64 [n]."""
        correct = predictions == labels[:, None]  # [n, k]
        return TopCounts(len(labels), top1_correct=int(correct[:, 0].sum()), top5_correct=int(correct.sum()))

    @property
    def top1(self) -> float:
        """Return the share of images whose label is the best class."""
        return self.top1_correct / self.images

    @property
    def top5(self) -> float:
        """Return the share of images whose label is among the five best classes."""
        return self.top5_correct / self.images

    def line(self) -> str:
        """Format the counts as one line."""
        return f"top-1 {percent(self.top1_correct, self.images)}, top-5 {percent(self.top5_correct, self.images)}"

    def metrics(self) -> dict[str, Any]:
        """Return the entries for a result file: accuracies as fractions, and the counts that they come from."""
        counts = {"images": self.images, "top1_correct": self.top1_correct, "top5_correct": self.top5_correct}
        return {"top1": self.top1, "top5": self.top5, **counts}


@dataclass(frozen=True)
class Score(TopCounts):
    """Counts and the mean cross-entropy, which is not finite if training diverged.

    bad_images: images that could not be decoded; they are in no other count.
    """

    loss: float
    bad_images: int = field(default=0, kw_only=True)

    def line(self) -> str:
        """Format the score as one line."""
        without = f", without {self.bad_images:,} that cannot be decoded" if self.bad_images else ""
        return f"{super().line()}, loss {self.loss:.4f}{without}" if math.isfinite(self.loss) else "diverged"

    def metrics(self) -> dict[str, Any]:
        """Return the entries for a result file, with None for a loss that is not finite, which JSON cannot hold."""
        loss = self.loss if math.isfinite(self.loss) else None
        return super().metrics() | {"bad_images": self.bad_images, "loss": loss}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A classifier's predictions for each image, on the CPU, sorted by id. Counts are integers, never averages."""

    ids: Tensor  # int64 [n], ascending
    labels: Tensor  # int64 [n]
    predictions: Tensor  # int64 [n, k], best first
    losses: Tensor  # float32 [n], cross-entropy
    confidences: Tensor  # float32 [n], the probability of the best class
    bad_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # that could not be decoded

    @cached_property
    def score(self) -> Score:
        """Return the score of all images. The loss is an exact sum, rounded once, whatever the order of the images."""
        counts = TopCounts.of(self.predictions, self.labels)
        loss = math.fsum(self.losses.tolist()) / counts.images
        return Score(**asdict(counts), loss=loss, bad_images=len(self.bad_ids))


def evaluate(predictor: Predictor, images: EvaluationImages, context: EvalContext) -> Evaluation:
    """Evaluate a classifier once on each image. Collective.

    If the predictor has columns, a label is an index into them. The train/eval mode of the network is restored. Raises
    DataError if an image has no label or one outside the network's classes, or if too many cannot be decoded;
    NumericsError if a loss is not finite.
    """
    return evaluate_with(lambda pixels: (predictor(pixels),), [predictor.network], images, context)[0]


def evaluate_with(
    classify: Callable[[Tensor], tuple[Tensor, ...]],
    networks: Sequence[nn.Module],
    images: EvaluationImages,
    context: EvalContext,
) -> tuple[Evaluation, list[Tensor]]:
    """Evaluate as `evaluate` does, by a function of pixels that runs the networks.

    classify: uint8 [b, ...] -> logits [b, C], and other tensors [b, ...], which are returned for all images.
    """
    images.index.require_labels()
    check = cache(partial(require_known_classes, images))

    def process_batch(pixels: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits, *others = classify(pixels)
        check(logits.shape[1])
        return *score_batch(logits, labels), *others

    with evaluation_mode(*networks):
        ids, classes, values, *others = full_pass(images, process_batch, context)
    losses, confidences = values.unbind(1)
    broken = ~losses.isfinite()  # [n]
    if broken.any():
        raise NumericsError(
            f"the loss of {int(broken.sum())} of {len(ids)} images is not finite, first "
            f"{images.index.sample_name(int(ids[broken][0]))}",
            "evaluate in precision fp32; if that does not help, the weights are broken: take an earlier checkpoint",
        )
    bad = left_out(images, ids)
    return Evaluation(ids, classes[:, 0], classes[:, 1:], losses, confidences, bad), others


def score_batch(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Score a batch per image: label and best classes, int64 [b, 1 + k]; loss and confidence, float [b, 2]."""
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=PADDING)  # [b]
    classes = torch.cat([labels[:, None], best_classes(logits)], dim=1)  # [b, 1 + k]
    return classes, torch.stack([losses, logits.softmax(1).amax(1)], dim=1)


def best_classes(logits: Tensor) -> Tensor:
    """Return the best classes, best first, and of equal logits the lower class first: [b, C] -> int64 [b, k]."""
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :_KEPT]


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
            f"have other labels, first {images.index.sample_name(i)} with {images.index.labels[i]}",
            "use shards with the classes that the model was trained on, or fine-tune it on these (maedistill finetune)",
        )


def write_predictions(path: Path, evaluation: Evaluation, index: ShardIndex) -> None:
    """Write a CSV file: id, shard, key, label, loss, the best classes, and class names if known.

    An image that could not be decoded has neither a loss nor classes.
    """
    best = [f"top{place + 1}" for place in range(evaluation.predictions.shape[1])]
    names = dict(enumerate(index.classes))
    heads = ["id", "shard", "key", "label", "loss", *best, *(["label_name", "top1_name"] if names else [])]
    columns = (evaluation.ids, evaluation.losses, evaluation.predictions)
    values = zip(*(column.tolist() for column in columns), strict=True)
    seen = [(i, f"{loss:.9g}", classes) for i, loss, classes in values]  # 9 digits represent a float32 exactly
    bad = [(i, "", [""] * len(best)) for i in evaluation.bad_ids.tolist()]
    rows = []
    for i, loss, classes in sorted(seen + bad):
        shard, label = Path(index.shards[index.shard_of(i)]).name, int(index.labels[i])
        label_names = [names.get(label, ""), names.get(classes[0], "")] if names else []
        rows.append([i, shard, index.key(i), label, loss, *classes, *label_names])
    write_csv(path, [heads, *rows])


def write_csv(path: Path, rows: Iterable[Sequence[str | int]]) -> None:
    """Write the rows, a header first, to a CSV file atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(cell, row) for row in rows)
    write_text(path, text.getvalue())
