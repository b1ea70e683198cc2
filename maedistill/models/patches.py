"""Patches of an image as rows of pixels, and the tables of their positions, fixed or rotary.

    B batch   N patches   M selected patches   D width   H heads   d their width   p patch side   s image side

Patch ids count patches in raster order from 0, without the class token.
"""

from typing import Any

import torch
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


def gather_rows(rows: Tensor, ids: Tensor) -> Tensor:
    """Pick rows by id: rows [B, N, D] (or [1, N, D], shared by the batch), ids [B, M] -> [B, M, D]."""
    rows = rows.expand(ids.shape[0], -1, -1)
    return torch.gather(rows, 1, ids.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def finer_ids(ids: Tensor, *, grid: int, factor: int) -> Tensor:
    """Return the ids, on a grid that is `factor` times as fine, of the finer patches that each patch covers.

    ids: int64 [B, M] on a grid x grid of patches -> [B, M * factor**2], the parts of a patch side by side.
    """
    row, column = ids[..., None] // grid * factor, ids[..., None] % grid * factor  # [B, M, 1]
    part = torch.arange(factor**2, device=ids.device)
    return ((row + part // factor) * (grid * factor) + column + part % factor).flatten(1)


def position_table(kind: str, *, grid: int, width: int, num_prefix: int = 0) -> Tensor:
    """Return the fixed table `kind`, float32 [1, prefix + N, D]. For sincos2d, D must be a multiple of 4.

    `sincos2d` is MAE's (He et al., 2022, after Chen et al., 2021): the first half of the channels encodes the column,
    the second half the row, and each half holds all sines, then all cosines. `sincos1d` is the table of Vaswani et al.
    (2017) over the raster index, as in VideoMAE and AMD: sines on even channels, cosines on odd ones. The first
    `num_prefix` rows, for class and register tokens, are zeros.
    """
    index = torch.arange(grid * grid)[:, None]  # [N, 1]
    if kind == "sincos2d":
        assert width % 4 == 0
        frequency = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))  # [D/4]
        column, row = index % grid * frequency, index // grid * frequency  # [N, D/4]
        table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    else:
        assert kind == "sincos1d"
        channel = torch.arange(width)
        angle = index * 10000 ** -(2 * (channel // 2).double() / width)  # [N, D]
        table = torch.where(channel % 2 == 0, angle.sin(), angle.cos())
    return torch.cat([torch.zeros(num_prefix, width), table.float()])[None]


def learns_rope(vit: Any) -> bool:
    """Return whether the rotary frequencies are parameters, of each block and head."""
    return getattr(vit, "rope_mixed", False)


def rope_table(vit: Any) -> Tensor | None:
    """Return timm's table of sines and cosines, None without rotary positions.

    [1, N, 2d] for all blocks and heads, or [depth, H, N, 2d] if each has its own. It is the table of evaluation: in
    training, timm would draw random scales for some models (`rope_rescale_coords`).
    """
    rope = getattr(vit, "rope", None)
    if rope is None:
        return None
    shape = list(vit.patch_embed.grid_size)
    if learns_rope(vit):  # computed in every forward pass, and never drawn
        return rope.get_embed(shape=shape)
    training = rope.training
    table = rope.eval().get_embed(shape=shape)
    rope.train(training)
    return table[None]


def rope_rows(table: Tensor, ids: Tensor | None) -> Tensor:
    """Pick the rows of a block's table: [1 or H, N, 2d], [B, M] -> [B, 1 or H, M, 2d]; all of them as they are."""
    return table if ids is None else table[:, ids].transpose(0, 1)
