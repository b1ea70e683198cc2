"""One random patch order per image, cut twice: which patches the student sees, which the teacher, which are predicted.

    B batch   N patches   S, T patches visible to student and teacher   D width

With S <= T <= N, `order[:, :S]` is what the student sees, `order[:, :T]` what the teacher sees, `order[:, S:]` is where
pixels are predicted and `order[:, S:T]` where AMD's generators predict features. MAE has T == S and no teacher, DMAE
has T == S, AMD has T > S. Patch ids count patches in raster order from 0, the class token excluded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from maedistill.randomness import Stream, bits


@dataclass(frozen=True)
class PatchSplit:
    """The patch order of a batch and where it is cut. `order` int64 [B, N] holds a permutation of patch ids per row."""

    order: Tensor
    num_student: int
    num_teacher: int

    def __post_init__(self) -> None:
        assert 1 <= self.num_student <= self.num_teacher <= self.order.shape[1]

    @property
    def student(self) -> Tensor:
        """Ids of the patches that the student sees: [B, S]."""
        return self.order[:, : self.num_student]

    @property
    def teacher(self) -> Tensor:
        """Ids of the patches that the teacher sees, the student's first: [B, T]."""
        return self.order[:, : self.num_teacher]

    @property
    def hidden(self) -> Tensor:
        """Ids of the patches whose pixels are predicted: [B, N - S]."""
        return self.order[:, self.num_student :]


def random_split(positions: Tensor, *, seed: int, num_patches: int, num_student: int, num_teacher: int) -> PatchSplit:
    """Draws the patch order of each sample position: a uniform permutation that depends on (seed, position) alone.

    positions: int64 [B] on any device; the order is on the same device. Ties of 64-bit words are broken by id.
    """
    order = bits(seed, positions, Stream.MASK, n=num_patches).argsort(dim=1, stable=True)  # [B, N]
    return PatchSplit(order, num_student, num_teacher)


def num_visible(share: float, num_patches: int) -> int:
    """How many of `num_patches` a visible share means: 0.25 of 196 is 49."""
    return round(share * num_patches)


def gather_rows(rows: Tensor, ids: Tensor) -> Tensor:
    """Picks rows by id: rows [B, N, D] (or [1, N, D], shared by the batch), ids [B, M] -> [B, M, D]."""
    rows = rows.expand(ids.shape[0], -1, -1)
    return torch.gather(rows, 1, ids.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
