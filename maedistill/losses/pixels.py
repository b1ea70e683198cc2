"""The pixel loss of masked autoencoding: the target of a hidden patch, and the error of its prediction.

B batch   H hidden patches   p patch side
"""

import torch
from einops import rearrange
from torch import Tensor


def patch_statistics(rows: Tensor, *, kind: str) -> tuple[Tensor, Tensor]:
    """Return the shift and scale that normalise pixel rows [B, H, p*p*3]; both broadcast against the rows.

    raw: none (0 and 1). norm_patch: mean and sqrt(unbiased variance + 1e-6) over the whole patch (MAE, section 3).
    norm_patch_channel: mean and unbiased deviation + 1e-6 of each channel of the patch (VideoMAE and AMD).
    """
    if kind == "raw":
        return rows.new_zeros(1), rows.new_ones(1)
    if kind == "norm_patch":
        return rows.mean(-1, keepdim=True), (rows.var(-1, keepdim=True) + 1e-6).sqrt()
    assert kind == "norm_patch_channel"
    pixels = rearrange(rows, "b h (x c) -> b h x c", c=3)
    repeat = pixels.shape[2]
    shift = pixels.mean(2)  # [B, H, 3]
    scale = pixels.var(2).sqrt() + 1e-6
    return shift.repeat(1, 1, repeat), scale.repeat(1, 1, repeat)


def pixel_target(rows: Tensor, *, kind: str) -> Tensor:
    """Return the decoder's target: pixel rows [B, H, p*p*3] of hidden patches, normalised by `kind`."""
    shift, scale = patch_statistics(rows, kind=kind)
    return (rows - shift) / scale


def pixel_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over hidden patches, in fp32: both [B, H, p*p*3] -> scalar."""
    return torch.nn.functional.mse_loss(predicted.float(), target.float())
