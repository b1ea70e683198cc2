"""Accuracy of a classifier per class: counts, confidence, and the class it is most often confused with.

Evaluation -> class_scores -> write_per_class -> a CSV file with one line per class, and class names if known

n images   C classes
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from maedistill.evaluation.accuracy import Evaluation
from maedistill.runs.records import write_text

_COLUMNS = ("class", "name", "images", "correct", "correct5", "top1", "top5", "confidence")
_WRONG = ("wrong_class", "wrong_name", "wrong_images")


@dataclass(frozen=True)
class ClassScore:
    """The score of one class. confidence: mean over all images of the class, classified correctly or not."""

    label: int
    images: int
    top1: int
    top5: int
    confidence: float
    wrong: int | None  # the most frequent wrong prediction; ties go to the lower class; None if there is none
    wrong_images: int


def class_scores(evaluation: Evaluation) -> Iterator[ClassScore]:
    """Yield one score per class that has images, in the order of the labels."""
    order = evaluation.labels.argsort(stable=True)  # [n]
    counts = evaluation.labels.bincount()  # [C]
    parts = (values[order].split(counts.tolist()) for values in (evaluation.predictions, evaluation.confidences))
    for label, (predictions, confidences) in enumerate(zip(*parts, strict=True)):
        if not len(predictions):
            continue
        mistakes = Counter(said for said in predictions[:, 0].tolist() if said != label)
        wrong, often = min(mistakes.items(), key=lambda item: (-item[1], item[0]), default=(None, 0))
        yield ClassScore(
            label=label,
            images=len(predictions),
            top1=int((predictions[:, 0] == label).sum()),
            top5=int((predictions == label).sum()),
            confidence=math.fsum(confidences.tolist()) / len(predictions),
            wrong=wrong,
            wrong_images=often,
        )


def write_per_class(path: Path, evaluation: Evaluation, names: Mapping[int, str]) -> None:
    """Write a CSV file atomically, one line per class that has images. names: known class names, by label."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*_COLUMNS, *_WRONG])
    for score in class_scores(evaluation):
        shares = [f"{count / score.images:.6g}" for count in (score.top1, score.top5)]
        wrong = ["", ""] if score.wrong is None else [score.wrong, names.get(score.wrong, "")]
        known = [score.label, names.get(score.label, ""), score.images, score.top1, score.top5]
        table.writerow([*known, *shares, f"{score.confidence:.6g}", *wrong, score.wrong_images])
    write_text(Path(path), text.getvalue())
