"""Reconstruction sheets: the patches that student and teacher see of an image, and the student's prediction.

B images, one per line   s image side
"""

from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from maedistill.evaluation.full_pass import evaluation_mode
from maedistill.methods.mae import MAE
from maedistill.models.masking import PatchSplit
from maedistill.models.patches import patchify, unpatchify

_GREY = 0.5
_LEAST_SIDE = 96  # smaller images are enlarged to at least this many pixels, without smoothing
_HEADER, _GAP = 18, 4


def show_only(images: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """Grey out all patches except `ids`: [B, 3, s, s], int64 [B, M] -> [B, 3, s, s]."""
    return paste(images, torch.full_like(images, _GREY), ids, patch_size)


def paste(images: Tensor, predicted: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """Paste the true patches `ids` into the predictions: [B, 3, s, s] twice, int64 [B, M] -> [B, 3, s, s]."""
    rows, predicted_rows = patchify(images, patch_size), patchify(predicted, patch_size)  # [B, N, p*p*3]
    visible = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device).scatter_(1, ids, True)  # [B, N]
    return unpatchify(torch.where(visible[..., None], rows, predicted_rows), patch_size)


def reconstruction_sheet(method: MAE, images: Tensor, split: PatchSplit, *, teacher: bool) -> Image.Image:
    """Draw one line per image: the image, the student's view, the teacher's view if it has one, and the prediction.

    images: [B, 3, s, s] in [0, 1]. The true visible patches are pasted into the prediction.
    """
    patch_size = method.encoder.patch_size
    with evaluation_mode(method):
        predicted = method.draw(images, split)
    columns = {"image": images, "student sees": show_only(images, split.student, patch_size)}
    if teacher:
        columns["teacher sees"] = show_only(images, split.teacher, patch_size)
    columns["student predicts"] = paste(images, predicted, split.student, patch_size)
    return tile(columns)


def tile(columns: Mapping[str, Tensor]) -> Image.Image:
    """Tile labelled columns of images, [B, 3, s, s] in [0, 1], into one picture. Enlarges small images unsmoothed."""
    images = next(iter(columns.values()))
    side = images.shape[-1]
    scale = max(1, -(-_LEAST_SIDE // side))
    step = side * scale + _GAP
    sheet = Image.new("RGB", (step * len(columns) + _GAP, _HEADER + step * len(images)), "white")
    pen = ImageDraw.Draw(sheet)
    for x, (label, column) in enumerate(columns.items()):
        pen.text((_GAP + x * step, 4), label, fill="black")
        pixels = (column.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # [B, s, s, 3]
        for y, picture in enumerate(pixels):
            enlarged = Image.fromarray(picture).resize((side * scale, side * scale), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (_GAP + x * step, _HEADER + y * step))
    return sheet
