"""Conversion between images and rows of patches.

B batch   N patches in raster order   p patch side   s image side
"""

from einops import rearrange
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches: [B, 3, s, s] -> [B, N, p*p*3], pixels in (row, column, channel) order as in MAE."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(rows: Tensor, patch_size: int) -> Tensor:
    """Invert `patchify` for a square grid: [B, N, p*p*3] -> [B, 3, s, s]."""
    side = round(rows.shape[1] ** 0.5)
    assert side * side == rows.shape[1], f"{rows.shape[1]} patches are no square grid"
    return rearrange(rows, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=patch_size, q=patch_size)
