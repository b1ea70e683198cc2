"""Reconstruction sheets: the patches that student and teacher see of an image, the student's prediction, its error.

B images, one per line   s image side
"""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maedistill.evaluation.full_pass import evaluation_mode
from maedistill.methods.mae import MAE
from maedistill.models.masking import PatchSplit
from maedistill.models.patches import patchify, unpatchify

_GREY = 0.5
_LEAST_SIDE = 192  # smaller images are enlarged to at least this many pixels, without smoothing
_HEADER, _GAP, _GROUP_GAP = 52, 4, 24  # the header has two lines: the title, and the labels of the columns
_FONT_SIZE = 16
_ERROR_SCALE = 2  # an error of 0.5 is white


def show_only(images: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """Grey out all patches except `ids`: [B, 3, s, s], int64 [B, M] -> [B, 3, s, s]."""
    return paste(images, torch.full_like(images, _GREY), ids, patch_size)


def paste(images: Tensor, predicted: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """Paste the true patches `ids` into the predictions: [B, 3, s, s] twice, int64 [B, M] -> [B, 3, s, s]."""
    rows, predicted_rows = patchify(images, patch_size), patchify(predicted, patch_size)  # [B, N, p*p*3]
    visible = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device).scatter_(1, ids, True)  # [B, N]
    return unpatchify(torch.where(visible[..., None], rows, predicted_rows), patch_size)


def reconstruction_sheet(
    method: MAE, images: Tensor, split: PatchSplit, *, teacher: bool, title: str = ""
) -> Image.Image:
    """Draw one line per image: what student and teacher see, a gap, then the prediction, the image, and their distance.

    images: [B, 3, s, s] in [0, 1]. The true visible patches are pasted into the prediction. The teacher's column is
    left out if it sees the same patches. title: before the mean error of the hidden pixels, which this function adds.
    """
    patch_size = method.encoder.patch_size
    with evaluation_mode(method):
        predicted = paste(images, method.draw(images, split), split.student, patch_size)
    seen = {"student sees" if teacher else "seen": show_only(images, split.student, patch_size)}
    if teacher and split.num_teacher > split.num_student:
        seen["teacher sees"] = show_only(images, split.teacher, patch_size)
    error = (predicted - images).abs()
    share_hidden = split.hidden.shape[1] / split.order.shape[1]  # the error of visible patches is 0
    shown_error = (_ERROR_SCALE * error.mean(1, keepdim=True)).expand_as(images)
    results = {"predicted": predicted, "true": images, f"|error| x {_ERROR_SCALE}": shown_error}
    start = f"{title}, " if title else ""
    return tile([seen, results], title=f"{start}mean |error| of hidden pixels {float(error.mean()) / share_hidden:.3f}")


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
    pen.text((_GAP, 4), title, fill="black", font=font)
    left = _GAP
    for columns in groups:
        for label, column in columns.items():
            pen.text((left, _HEADER // 2 + 2), label, fill="black", font=font)
            pixels = (column.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # [B, s, s, 3]
            for y, picture in enumerate(pixels):
                enlarged = Image.fromarray(picture).resize((side * scale, side * scale), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (left, _HEADER + y * step))
            left += step
        left += _GROUP_GAP
    return sheet
