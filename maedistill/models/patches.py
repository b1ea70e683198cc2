"""Images as rows of patches and back.

B batch   N patches in raster order   p patch side   s image side
"""

from einops import rearrange
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, 3, s, s] -> [B, N, p*p*3], the pixels of a patch in (row, column, channel) order as in MAE."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(rows: Tensor, patch_size: int) -> Tensor:
    """[B, N, p*p*3] -> [B, 3, s, s] for a square grid: the inverse of `patchify`."""
    side = round(rows.shape[1] ** 0.5)
    assert side * side == rows.shape[1], f"{rows.shape[1]} patches are no square grid"
    return rearrange(rows, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=patch_size, q=patch_size)
