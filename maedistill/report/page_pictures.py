"""The reconstruction sheets in a run folder as a piece of a page, with a slider over epochs."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from maedistill.report.markup import Album, Html, element, note
from maedistill.report.recorded import RecordedRun
from maedistill.report.sheet import untile

_SIDE, _GAP = 112, 3  # pixels of an image in a strip, and between two
_MOST_PIXELS = 64_000_000  # of a sheet
_SHEETS = {  # the columns of a sheet, by their groups
    (2, 3): ("student sees", "teacher sees", "predicted", "true", "error"),
    (1, 3): ("seen", "predicted", "true", "error"),
}
_ODD = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # of pictures that are damaged or huge


def reconstructions(run: RecordedRun, album: Album, *, most: int) -> Html:
    """Return the newest sheet as strips, one per column; a slider goes through the predictions of other epochs.

    most: sheets. Images and masks are the same at every epoch, so what is seen and what is true is shown once.
    """
    files = sorted(file for file in (run.path / "pictures").glob("*.png") if re.fullmatch(r"step_[0-9]+", file.stem))
    places = sorted({round(i * (len(files) - 1) / max(1, most - 1)) for i in range(most)}) if files else []
    sheets = {files[i]: _columns(files[i], side=run.config.data.image_size) for i in places}
    newest = next((columns for columns in reversed(sheets.values()) if columns), None)
    if newest is None:
        return Html()
    sheets = {file: columns for file, columns in sheets.items() if columns.keys() == newest.keys()}
    epochs = [f"{run.epoch_at(int(file.stem.removeprefix('step_'))):.4g}" for file in sheets]
    strips: dict[str, list[Html]] = {label: [] for label in newest}
    for columns, epoch in reversed([*zip(sheets.values(), epochs, strict=True)]):  # what is seen first gets the room
        for label, images in columns.items():
            if label in ("predicted", "error"):
                about = f"{label}, epoch {epoch}"
                strips[label].insert(0, album.add(_strip(images), about, css="at" * bool(strips[label])))
            elif not strips[label]:
                strips[label].append(album.add(_strip(images), label))
    rows = (
        element("figure", element("figcaption", label), element("div", *each, css="scroll"), css="strip")
        for label, each in strips.items()
    )
    last = str(len(epochs) - 1)
    steps = {"type": "range", "min": "0", "max": last, "value": last, "data-epochs": " ".join(epochs)}
    knob = element("input", attributes=steps) if len(epochs) > 1 else ""
    slider = element("label", "epoch ", element("output", epochs[-1]), knob, css="slider")
    left_out = note(f"{len(sheets)} of {len(files)} pictures are shown." if len(sheets) < len(files) else "")
    css = "sheet pixelated" if run.config.data.image_size < _SIDE else "sheet"
    return element("div", slider, *rows, left_out, css=css)


def open_picture(file: Path) -> Image.Image | None:
    """Return the picture of a PNG file; None without one, for one that a kill cut short, and for a huge one."""
    with suppress(*_ODD), Image.open(file, formats=("PNG",)) as picture:
        return picture.convert("RGB") if picture.width * picture.height <= _MOST_PIXELS else None
    return None


def _columns(file: Path, *, side: int) -> dict[str, list[Image.Image]]:
    """Return the images of a sheet by column; nothing for another picture."""
    if sheet := open_picture(file):
        for groups, labels in _SHEETS.items():
            if columns := untile(sheet, side=side, groups=groups):
                return dict(zip(labels, columns, strict=True))
    return {}


def _strip(images: Sequence[Image.Image]) -> Image.Image:
    """Return the images side by side, `_SIDE` pixels each."""
    strip = Image.new("RGB", ((_SIDE + _GAP) * len(images) - _GAP, _SIDE), (176, 184, 196))
    for place, image in enumerate(images):
        small = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2)
        strip.paste(small, ((_SIDE + _GAP) * place, 0))
    return strip
