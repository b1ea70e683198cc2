"""Sheets: labelled images side by side in one picture.

B images, one per line   s image side
"""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maedistill.escaping import shown

_LEAST_SIDE = 192  # smaller images are enlarged to at least this many pixels, without smoothing
_HEADER, _GAP, _GROUP_GAP = 52, 4, 24  # the header has two lines: the title, and the labels of the columns
_FONT_SIZE = 16


def tile(groups: Sequence[Mapping[str, Tensor]], *, title: str = "") -> Image.Image:
    """Tile groups of labelled columns of images, [B, 3, s, s] in [0, 1], into one picture, with a gap between groups.

    Enlarges small images unsmoothed.
    """
    images = next(iter(groups[0].values()))
    side = images.shape[-1]
    scale = max(1, -(-_LEAST_SIDE // side))
    step = side * scale + _GAP
    count = sum(map(len, groups))
    width = step * count + _GAP + _GROUP_GAP * (len(groups) - 1)
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
