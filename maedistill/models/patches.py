"""Patches of an image: as rows of pixels, their fixed position tables, and the random choice of those that are visible.

    B batch   N patches   S, T patches visible to student and teacher   D width   p patch side   s image side

Patch ids count patches in raster order from 0, without the class token.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from maedistill.randomness import Stream, bits


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


@dataclass(frozen=True)
class PatchSplit:
    """One random patch order per image, cut twice. Each row of `order`, int64 [B, N], is a permutation of patch ids.

    With S <= T <= N, the student sees `order[:, :S]` and the teacher sees `order[:, :T]`. Pixels are predicted at
    `order[:, S:]`, and AMD's generators predict features at `order[:, S:T]`. MAE has T == S and no teacher, DMAE has
    T == S, AMD has T > S.
    """

    order: Tensor
    num_student: int
    num_teacher: int

    def __post_init__(self) -> None:
        assert 1 <= self.num_student <= self.num_teacher <= self.order.shape[1]

    @property
    def student(self) -> Tensor:
        """Return the ids of the patches that the student sees: [B, S]."""
        return self.order[:, : self.num_student]

    @property
    def teacher(self) -> Tensor:
        """Return the ids of the patches that the teacher sees, the student's first: [B, T]."""
        return self.order[:, : self.num_teacher]

    @property
    def hidden(self) -> Tensor:
        """Return the ids of the patches whose pixels are predicted: [B, N - S]."""
        return self.order[:, self.num_student :]


def random_split(positions: Tensor, *, seed: int, num_patches: int, num_student: int, num_teacher: int) -> PatchSplit:
    """Draw the patch order of each sample position: a uniform permutation that depends on (seed, position) alone.

    positions: int64 [B] on any device; the order is on the same device. Ties of 64-bit words are broken by patch id.
    """
    order = bits(seed, positions, Stream.MASK, n=num_patches).argsort(dim=1, stable=True)  # [B, N]
    return PatchSplit(order, num_student, num_teacher)


def num_visible(share: float, num_patches: int) -> int:
    """Return the number of patches that a visible share stands for: 0.25 of 196 is 49."""
    return round(share * num_patches)


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
