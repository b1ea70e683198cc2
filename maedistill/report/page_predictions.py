"""A classifier's predictions beside the truth, and the classes that it confuses, as a piece of a page.

RUN/predictions.csv, which `maedistill evaluate RUN SHARDS --predictions` writes -> answers -> images from the shards
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from PIL import Image, ImageOps

from maedistill.config.finetune import FinetuneConfig
from maedistill.data.remote.urls import is_url
from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.scan import Members
from maedistill.errors import ConfigError, DataError
from maedistill.escaping import cell
from maedistill.report.markup import Album, Html, element, joined
from maedistill.report.recorded import RecordedRun

PREDICTIONS = "predictions.csv"
_SIDE = 96  # pixels of an image
_PAIRS, _EXAMPLES, _SAMPLE = 6, 6, 12
_MOST_PIXELS, _MOST_BYTES = 64_000_000, 50_000_000  # of an image in a shard


class Answer(NamedTuple):
    """One row of the file: the best class of one image, and its label."""

    id: int
    key: str
    label: int
    best: int
    loss: float


def predictions(run: RecordedRun, album: Album, *, share: int) -> Html:
    """Return images with their predictions and labels, and the pairs of classes that are confused most.

    share: runs among which the pictures of a page are divided. Empty without RUN/predictions.csv.
    """
    answers = _read_answers(run)
    if not answers:
        return Html()
    index = _open_images(run, answers)

    def thumbnail(answer: Answer) -> Html:
        if isinstance(index, str):
            return Html()
        try:
            picture = _read_image(index, answer.id, upright=run.config.data.exif == "apply")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            picture = Image.new("RGB", (_SIDE, _SIDE), "gray")
        return album.add(picture, f"image {answer.id}")

    names = run.metadata.get("classes") or ()

    def name(label: int) -> str:
        return str(names[label]) if label < len(names) else f"class {label}"

    wrong = sorted((one for one in answers if one.best != one.label), key=lambda one: -one.loss)
    lines = [element("p", f"{len(wrong):,} of {len(answers):,} images are classified wrongly.")]
    lines += [element("p", f"The images are not shown: {index}.", css="note")] if isinstance(index, str) else []
    count = max(4, _SAMPLE // share)
    sample = answers[:: -(-len(answers) // count)]
    lines += [element("h3", "Prediction and truth"), _cards(sample, thumbnail, name)]
    if wrong:
        pairs = Counter((one.label, one.best) for one in wrong).most_common(max(2, _PAIRS // share))
        strips = [_confusion(label, best, answers, wrong, thumbnail, name) for (label, best), _ in pairs]
        lines += [element("h3", "Worst confusions"), element("div", *strips, css="pairs")]
    return joined(lines)


def _cards(sample: Sequence[Answer], thumbnail: Callable[[Answer], Html], name: Callable[[int], str]) -> Html:
    """Return each image with its prediction and its label."""
    cards = []
    for one in sample:
        said = element("b", name(one.best), css="right" if one.best == one.label else "wrong")
        caption = element("figcaption", said, element("br"), f"true: {name(one.label)}")
        cards.append(element("figure", thumbnail(one), caption))
    return element("div", *cards, css="cards")


def _confusion(
    label: int,
    best: int,
    answers: Sequence[Answer],
    wrong: Sequence[Answer],
    thumbnail: Callable[[Answer], Html],
    name: Callable[[int], str],
) -> Html:
    """Return the images of one class that were taken for another, those with the largest loss first."""
    these = [one for one in wrong if (one.label, one.best) == (label, best)]
    images = sum(one.label == label for one in answers)
    counts = f": {len(these):,} of {images:,} images"
    about = element("p", element("b", name(label)), " taken for ", element("b", name(best)), counts)
    return element("div", about, element("div", *map(thumbnail, these[:_EXAMPLES]), css="thumbs"))


def _read_answers(run: RecordedRun) -> list[Answer]:
    """Read the file of predictions; nothing without it. Images that could not be decoded have no row here."""
    if not (file := run.path / PREDICTIONS).is_file() or not isinstance(run.config, FinetuneConfig):
        return []
    try:
        with file.open(newline="") as lines:
            rows = [row for row in csv.DictReader(lines) if row["top1"]]
        return [Answer(int(r["id"]), r["key"], int(r["label"]), int(r["top1"]), float(r["loss"])) for r in rows]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"{file} is not what maedistill evaluate --predictions writes ({error})", "remove it, or write it again"
        ) from error


def _open_images(run: RecordedRun, answers: Sequence[Answer]) -> ShardIndex | str:
    """Return the index of the images, or why they are not at hand."""
    data = run.config.data
    if not data.val or is_url(data.val):
        return "data.val is not on this machine"
    try:
        index = open_index(data.val, split="val", members=Members(data.image_key, data.label_key))
    except (ConfigError, DataError) as error:
        return error.cause
    same = all(0 <= one.id < len(index) and cell(index.key(one.id)) == one.key for one in answers)
    return index if same else "the predictions are of other images than those of data.val"


def _read_image(index: ShardIndex, i: int, *, upright: bool) -> Image.Image:
    """Read one image with Pillow alone, because decode.py imports torch: its middle, as a thumbnail."""
    with open(index.shards[index.shard_of(i)], "rb") as shard:
        shard.seek(int(index.offsets[i]))
        data = shard.read(min(int(index.sizes[i]), _MOST_BYTES))
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise ValueError("too large")
        image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
        turned = ImageOps.exif_transpose(image) if upright else image
        small = min(turned.size) < _SIDE
        how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
        return ImageOps.fit(turned.convert("RGB"), (_SIDE, _SIDE), how)
