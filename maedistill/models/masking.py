"""The masks: one random patch order per image, cut twice, for student and teacher.

    B batch   N patches   S, T patches visible to student and teacher

Patch ids count patches in raster order from 0, without the class token.
"""

from dataclasses import dataclass

from torch import Tensor

from maedistill.randomness import Stream, bits


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
