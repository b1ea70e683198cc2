"""A classifier's results by class: a table of scores, and the pairs of classes that it confuses most, with images.

Evaluation -> class_rows -> write_per_class -> a CSV file with one line per class, and class names if known
Evaluation -> worst_confusions -> draw_confusions -> one strip per pair: counts and class names, then images

Each image is drawn as the network receives it, cropped and resized.

n images   C classes   e examples of a pair   s image side
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from maedistill.data.loading.evaluation import EvaluationImages
from maedistill.evaluation.accuracy import Evaluation, TopCounts, write_csv

_COLUMNS = ["class", "name", "images", "correct", "correct5", "top1", "top5", "confidence"]
_COLUMNS += ["wrong_class", "wrong_name", "wrong_images"]
_PAIRS, _EXAMPLES = 12, 8
_SIDE = 112  # pixels per image on the sheet; larger images are reduced, smaller ones enlarged by an integer factor
_TEXT, _GAP = 18, 4
_LONGEST_NAME = 48  # characters


def class_rows(evaluation: Evaluation, names: Mapping[int, str]) -> Iterator[list[str | int]]:
    """Yield the cells of `_COLUMNS` of each class that has images, in the order of the labels.

    confidence is the mean over all images of the class, classified correctly or not. wrong_class is the most frequent
    wrong prediction; ties go to the lower class. names: known class names, by label.
    """
    for label in evaluation.labels.unique().tolist():
        rows = evaluation.labels == label  # [n]
        predictions, confidences = evaluation.predictions[rows], evaluation.confidences[rows]
        counts = TopCounts.of(predictions, evaluation.labels[rows])
        sums = (counts.top1_correct, counts.top5_correct, math.fsum(confidences.tolist()))
        mistakes = Counter(best for best in predictions[:, 0].tolist() if best != label)
        worst = min(mistakes.items(), key=lambda item: (-item[1], item[0]), default=None)
        cells = [label, names.get(label, ""), counts.images, counts.top1_correct, counts.top5_correct]
        cells += [f"{total / counts.images:.6g}" for total in sums]
        yield [*cells, *((worst[0], names.get(worst[0], ""), worst[1]) if worst else ("", "", 0))]


def write_per_class(path: Path, evaluation: Evaluation, names: Mapping[int, str]) -> None:
    """Write a CSV file, one line per class that has images. names: known class names, by label."""
    write_csv(path, [_COLUMNS, *class_rows(evaluation, names)])


@dataclass(frozen=True)
class Confusion:
    """The images of one class that were all predicted as the same wrong class."""

    label: int
    predicted: int
    ids: tuple[int, ...]  # of all these images, the most confident first
    images: int  # of the class, whether classified correctly or not


def worst_confusions(evaluation: Evaluation, *, most: int = _PAIRS) -> list[Confusion]:
    """Return at most `most` pairs (label, predicted class) with most images. Ties go to the lower label."""
    labels, best = evaluation.labels, evaluation.predictions[:, 0]  # [n] each
    pairs = Counter(zip(labels.tolist(), best.tolist(), strict=True))
    wrong = sorted((-count, label, predicted) for (label, predicted), count in pairs.items() if label != predicted)
    confusions = []
    for _, label, predicted in wrong[:most]:
        rows = ((labels == label) & (best == predicted)).nonzero().flatten()  # ascending ids
        rows = rows[evaluation.confidences[rows].argsort(descending=True, stable=True)]
        ids = tuple(evaluation.ids[rows].tolist())
        confusions.append(Confusion(label, predicted, ids, images=int((labels == label).sum())))
    return confusions


def draw_confusions(
    confusions: Sequence[Confusion], images: EvaluationImages, names: Mapping[int, str], *, examples: int = _EXAMPLES
) -> Image.Image:
    """Draw one strip per confusion: a line of text, then its first `examples` images.

    images: the images that the ids refer to. names: known class names, by label.
    """
    step = _SIDE + _GAP
    width, height = examples * step + _GAP, _TEXT + step
    sheet = Image.new("RGB", (width, max(height, height * len(confusions))), "white")
    pen = ImageDraw.Draw(sheet)
    if not confusions:
        pen.text((_GAP, _GAP), "no image was taken for another class", fill="black")
    for i, confusion in enumerate(confusions):
        label, predicted = (_class_text(number, names) for number in (confusion.label, confusion.predicted))
        line = f"{len(confusion.ids):,} of {confusion.images:,} images of {label} were taken for {predicted}"
        pen.text((_GAP, i * height + _GAP), line, fill="black")
        ids = torch.tensor(confusion.ids[:examples])
        pixels, *_ = images.with_samples(ids).__getitems__(list(range(len(ids))))  # uint8 [e, 3, s, s]
        for x, picture in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            sheet.paste(_resize(picture), (_GAP + x * step, i * height + _TEXT))
    return sheet


def _resize(pixels: np.ndarray) -> Image.Image:
    """Resize uint8 [s, s, 3] to at most `_SIDE` pixels a side. Small images are enlarged without smoothing."""
    picture, side = Image.fromarray(pixels), len(pixels)
    if side > _SIDE:
        return picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return picture.resize((_SIDE // side * side, _SIDE // side * side), Image.Resampling.NEAREST)


def _class_text(label: int, names: Mapping[int, str]) -> str:
    """Format a class with characters that Pillow's built-in font contains (Latin-1)."""
    name = names.get(label, "")
    short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
    return f"{short!r} ({label})".encode("latin-1", "replace").decode("latin-1") if name else f"class {label}"
