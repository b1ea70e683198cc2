"""The pairs of classes that a classifier confuses most, drawn on one sheet with example images.

    Evaluation -> worst_confusions -> draw_confusions -> one strip per pair: counts and class names, then images

Each image is drawn as the network receives it, cropped and resized.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from maedistill.data.loading.evaluation import EvaluationImages
from maedistill.evaluation.accuracy import Evaluation

_PAIRS, _EXAMPLES = 12, 8
_SIDE = 112  # pixels per image on the sheet; larger images are reduced, smaller ones enlarged by an integer factor
_TEXT, _GAP = 18, 4
_LONGEST_NAME = 48  # characters


@dataclass(frozen=True)
class Confusion:
    """The images of one class that were all predicted as the same wrong class."""

    label: int
    said: int
    ids: tuple[int, ...]  # of all these images, the most confident first
    images: int  # of the class, whether classified correctly or not


def worst_confusions(evaluation: Evaluation, *, most: int = _PAIRS) -> list[Confusion]:
    """Return at most `most` pairs (label, predicted class) with most images. Ties go to the lower label."""
    said = evaluation.predictions[:, 0]  # [n]
    pairs = Counter(zip(evaluation.labels.tolist(), said.tolist(), strict=True))
    wrong = sorted((-count, label, other) for (label, other), count in pairs.items() if label != other)
    found = []
    for _, label, other in wrong[:most]:
        rows = ((evaluation.labels == label) & (said == other)).nonzero().flatten()  # ascending ids
        rows = rows[evaluation.confidences[rows].argsort(descending=True, stable=True)]
        images = int((evaluation.labels == label).sum())
        found.append(Confusion(label, other, tuple(evaluation.ids[rows].tolist()), images))
    return found


def draw_confusions(
    confusions: Sequence[Confusion], images: EvaluationImages, names: Mapping[int, str], *, examples: int = _EXAMPLES
) -> Image.Image:
    """Draw one strip per confusion: a line of text, then its first `examples` images.

    images: the images that the ids refer to. names: known class names, by label. Raises DataError for an image that
    cannot be decoded.
    """
    step = _SIDE + _GAP
    width, height = examples * step + _GAP, _TEXT + step
    sheet = Image.new("RGB", (width, max(height, height * len(confusions))), "white")
    pen = ImageDraw.Draw(sheet)
    if not confusions:
        pen.text((_GAP, _GAP), "no image was taken for another class", fill="black")
    for i, confusion in enumerate(confusions):
        label, said = (_printed(number, names) for number in (confusion.label, confusion.said))
        line = f"{len(confusion.ids):,} of {confusion.images:,} images of {label} were taken for {said}"
        pen.text((_GAP, i * height + _GAP), line, fill="black")
        shown = EvaluationImages(images.index, torch.tensor(confusion.ids[:examples]), images.transform)
        pixels, *_ = shown.__getitems__(list(range(len(shown))))  # uint8 [e, 3, s, s]
        for x, picture in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            sheet.paste(_fitted(picture), (_GAP + x * step, i * height + _TEXT))
    return sheet


def _fitted(pixels: np.ndarray) -> Image.Image:
    """Resize uint8 [s, s, 3] to at most `_SIDE` pixels a side. Small images are enlarged without smoothing."""
    picture, side = Image.fromarray(pixels), len(pixels)
    if side > _SIDE:
        return picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return picture.resize((_SIDE // side * side, _SIDE // side * side), Image.Resampling.NEAREST)


def _printed(label: int, names: Mapping[int, str]) -> str:
    """Format a class with characters that Pillow's built-in font contains (Latin-1)."""
    name = names.get(label, "")
    short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
    return f"{short!r} ({label})".encode("latin-1", "replace").decode("latin-1") if name else f"class {label}"
