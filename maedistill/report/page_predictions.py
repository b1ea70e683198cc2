"""A classifier's predictions with the labels, and the classes that it confuses, as a piece of a page.

RUN/predictions.csv, which `maedistill evaluate RUN SHARDS --predictions` writes -> answers -> images from the shards
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from maedistill.config.finetune import FinetuneConfig
from maedistill.data.remote.urls import is_url
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.scan import Members
from maedistill.errors import ConfigError, DataError
from maedistill.escaping import cell
from maedistill.report.markup import Album, Html, element, joined, note, table
from maedistill.report.recorded import PREDICTIONS, RecordedRun, written

_SIDE, _SAMPLE, _MOST_PAIRS = 96, 12, 8  # pixels of an image; images, and half as many wrong ones; lines of a table
_MOST_BYTES = 50_000_000  # of an image in a shard


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
    file, classes = run.path / PREDICTIONS, run.metadata.get("classes") or ()
    answers = _read_answers(file) if file.is_file() and isinstance(run.config, FinetuneConfig) else []
    if not answers:
        return Html()
    wrong = sorted((one for one in answers if one.best != one.label), key=lambda one: -one.loss)
    labels = {label for one in answers for label in (one.label, one.best)}
    names = {i: str(classes[i]) if 0 <= i < len(classes) else f"class {i}" for i in labels}
    count = max(4, _SAMPLE // share)
    parts = {"Prediction and truth": answers[:: -(-len(answers) // count)]}
    parts |= {"Wrong, with the largest loss": wrong[: count // 2]} if wrong else {}
    pairs = Counter((one.label, one.best) for one in wrong).most_common(_MOST_PAIRS)
    each = max(1, count // 6)
    examples = {pair: [one for one in wrong if (one.label, one.best) == pair][:each] for pair, _ in pairs}
    pictures = _pictures(run, [one for part in (*parts.values(), *examples.values()) for one in part], album)
    counted = f"{len(wrong):,} of {len(answers):,} images are classified wrongly"
    lines = [element("p", f"{counted}, by {PREDICTIONS} of {written(file)}.")]
    if isinstance(pictures, str):
        lines.append(note(f"The images are not shown: {pictures}."))
    for title, part in parts.items():
        cards = (_card(one, names, "" if isinstance(pictures, str) else pictures[one.id]) for one in part)
        lines += [element("h3", title), element("div", *cards, css="cards")]
    if wrong:
        rows = [[names[label], names[best], f"{number:,}"] for (label, best), number in pairs]
        heads = ["true", "taken for", "images"]
        if not isinstance(pictures, str):
            heads.append("largest loss")
            for row, of_pair in zip(rows, examples.values(), strict=True):
                row.append(joined(pictures[one.id] for one in of_pair))
        lines += [element("h3", "Worst confusions"), table(heads, rows)]
    return joined(lines)


def _card(one: Answer, names: Mapping[int, str], picture: str) -> Html:
    """Return an image with its prediction and its label."""
    said = element("b", names[one.best], css="right" if one.best == one.label else "wrong")
    caption = element("figcaption", said, element("br"), f"true: {names[one.label]}")
    return element("figure", picture, caption)


def _read_answers(file: Path) -> list[Answer]:
    """Read the file of predictions. Images that could not be decoded have no row here."""
    try:
        with file.open(newline="") as lines:
            rows = [row for row in csv.DictReader(lines) if row["top1"]]
        return [Answer(int(r["id"]), r["key"], int(r["label"]), int(r["top1"]), float(r["loss"])) for r in rows]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"{file} is not what maedistill evaluate --predictions writes ({error})", "remove it, or write it again"
        ) from error


def _pictures(run: RecordedRun, answers: Sequence[Answer], album: Album) -> dict[int, Html] | str:
    """Return the thumbnails of the images by id, or why they are not at hand."""
    from maedistill.data.images.decode import BadImage, decode_rgb  # it imports torch, which other pages do not need

    data, pictures = run.config.data, dict[int, Html]()
    if not data.val or is_url(data.val):
        return "data.val is not on this machine"
    try:
        index = open_index(data.val, split="val", members=Members(data.image_key, data.label_key))
    except (ConfigError, DataError) as error:
        return error.cause
    if not all(0 <= one.id < len(index) and cell(index.key(one.id)) == one.key for one in answers):
        return "the predictions are of other images than those of data.val"
    for i in dict.fromkeys(one.id for one in answers):
        picture, about = Image.new("RGB", (_SIDE, _SIDE), "gray"), f"image {i}"
        try:
            with open(index.shards[index.shard_of(i)], "rb") as shard:
                shard.seek(int(index.offsets[i]))
                encoded = shard.read(min(int(index.sizes[i]), _MOST_BYTES))
            pixels = decode_rgb(encoded, apply_exif=data.exif == "apply")  # [3, H, W]
            whole = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            how = Image.Resampling.NEAREST if min(whole.size) < _SIDE else Image.Resampling.LANCZOS
            picture = ImageOps.fit(whole, (_SIDE, _SIDE), how)
        except (OSError, BadImage):
            about += " cannot be decoded"
        pictures[i] = album.add(picture, about)
    return pictures
