"""Fixed sin-cos position tables.

`sincos2d` is MAE's (He et al., 2022, after Chen et al., 2021): the first half of the channels encodes the column, the
second half the row, and each half holds all sines, then all cosines. `sincos1d` is the table of Vaswani et al. (2017)
over the raster index, as in VideoMAE and AMD: sines on even channels, cosines on odd ones.

    N patches   D width
"""

import torch
from torch import Tensor


def sincos2d(grid: int, width: int) -> Tensor:
    """Return the table of a grid x grid image: float32 [N, D] with N = grid * grid. D must be a multiple of 4."""
    assert width % 4 == 0
    frequency = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))  # [D/4]
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    halves = []
    for coordinate in (column, row):
        angle = coordinate.reshape(-1, 1) * frequency  # [N, D/4]
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()


def sincos1d(grid: int, width: int) -> Tensor:
    """Return the table over the raster index of a grid x grid image: float32 [N, D], interleaved."""
    channel = torch.arange(width)
    frequency = 10000 ** -(2 * (channel // 2).double() / width)  # [D]
    angle = torch.arange(grid * grid)[:, None] * frequency  # [N, D]
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def position_table(kind: str, *, grid: int, width: int, num_prefix: int = 0) -> Tensor:
    """Return the table `kind` after `num_prefix` rows of zeros for class and register tokens: [1, prefix + N, D]."""
    table = {"sincos2d": sincos2d, "sincos1d": sincos1d}[kind](grid, width)
    return torch.cat([torch.zeros(num_prefix, width), table])[None]
