"""Sheets: labelled images side by side in one picture, and the images of such a picture.

B images, one per line   s image side
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from maedistill.escaping import shown

if TYPE_CHECKING:  # report pages only take sheets apart
    from torch import Tensor

_LEAST_SIDE = 192  # smaller images are enlarged to at least this many pixels, without smoothing
_HEADER, _GAP, _GROUP_GAP = 52, 4, 24  # the header has two lines: the title, and the labels of the columns
_FONT_SIZE, _MOST_ROWS = 16, 64


def tile(groups: Sequence[Mapping[str, "Tensor"]], *, title: str = "") -> Image.Image:
    """Tile groups of labelled columns of images, [B, 3, s, s] in [0, 1], into one picture, with a gap between groups.

    Enlarges small images unsmoothed.
    """
    images = next(iter(groups[0].values()))
    side = images.shape[-1]
    scale = _scale(side)
    step = side * scale + _GAP
    width = _width(side, [len(group) for group in groups])
    sheet = Image.new("RGB", (width, _HEADER + step * len(images)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    pen.text((_GAP, 4), shown(title), fill="black", font=font)
    left = _GAP
    for columns in groups:
        for label, column in columns.items():
            pen.text((left, _HEADER // 2 + 2), shown(label), fill="black", font=font)
            pixels = (column.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # [B, s, s, 3]
            for y, picture in enumerate(pixels):
                enlarged = Image.fromarray(picture).resize((side * scale, side * scale), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (left, _HEADER + y * step))
            left += step
        left += _GROUP_GAP
    return sheet


def untile(sheet: Image.Image, *, side: int, groups: Sequence[int]) -> list[list[Image.Image]] | None:
    """Return the images of a sheet by column, each enlarged as `tile` has drawn it; None if it is not such a sheet.

    side: of an image before it was enlarged. groups: number of columns of each group.
    """
    drawn = side * _scale(side)
    rows = (sheet.height - _HEADER) // (drawn + _GAP)
    fits = sheet.size == (_width(side, groups), _HEADER + rows * (drawn + _GAP))
    if not fits or not 1 <= rows <= _MOST_ROWS:
        return None
    columns, left = list[list[Image.Image]](), _GAP
    for count in groups:
        for _ in range(count):
            tops = [_HEADER + row * (drawn + _GAP) for row in range(rows)]
            columns.append([sheet.crop((left, top, left + drawn, top + drawn)) for top in tops])
            left += drawn + _GAP
        left += _GROUP_GAP
    return columns


def _scale(side: int) -> int:
    return max(1, -(-_LEAST_SIDE // side))


def _width(side: int, groups: Sequence[int]) -> int:
    return (side * _scale(side) + _GAP) * sum(groups) + _GAP + _GROUP_GAP * (len(groups) - 1)
