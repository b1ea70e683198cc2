"""Reconstruction sheets: the patches that student and teacher see of an image, the student's prediction, its error.

B images, one per line   s image side
"""

import torch
from PIL import Image
from torch import Tensor

from maedistill.evaluation.full_pass import evaluation_mode
from maedistill.methods.mae import MAE
from maedistill.models.masking import PatchSplit
from maedistill.models.patches import patchify, unpatchify
from maedistill.report.sheet import tile

_GREY = 0.5
_ERROR_SCALE = 2  # an error of 0.5 is white


def show_only(images: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """Grey out all patches except `ids`: [B, 3, s, s], int64 [B, M] -> [B, 3, s, s]."""
    return paste(images, torch.full_like(images, _GREY), ids, patch_size)


def paste(images: Tensor, predicted: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """Paste the true patches `ids` into the predictions: [B, 3, s, s] twice, int64 [B, M] -> [B, 3, s, s]."""
    rows, predicted_rows = patchify(images, patch_size), patchify(predicted, patch_size)  # [B, N, p*p*3]
    visible = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device).scatter_(1, ids, True)  # [B, N]
    return unpatchify(torch.where(visible[..., None], rows, predicted_rows), patch_size)


def reconstruction_sheet(method: MAE, images: Tensor, split: PatchSplit, *, teacher: bool, title: str) -> Image.Image:
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
    mean = float(error.mean()) / share_hidden
    return tile([seen, results], title=f"{title}, mean |error| of hidden pixels {mean:.3f}")
