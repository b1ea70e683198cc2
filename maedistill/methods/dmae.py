"""DMAE (Bai et al., CVPR 2023): MAE plus alignment of features with those of a teacher that sees the same patches.

Further teachers have terms of their own, and heads: one student may learn from several at once.

B batch   S, T patches visible to student and teacher   P, Q prefix tokens of student and teacher   D_t teacher width
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maedistill.losses.features import feature_loss
from maedistill.methods.mae import MAE, BlockFeatures, Losses, PixelSpec, mean_loss
from maedistill.models.blocks import projection
from maedistill.models.decoder import TokenDecoder
from maedistill.models.encoder import Encoder
from maedistill.models.masking import PatchSplit


@dataclass(frozen=True)
class AlignmentSpec:
    """Feature alignment of pairs of blocks, one student tap with one teacher tap.

    class_token: align the class tokens too, which are the first prefix tokens. distance, normalize: of
    `losses.features.feature_loss`. projector, bias: of the projections. name: that its losses are logged under. more:
    the alignment with further teachers.
    """

    student_taps: tuple[int, ...]
    teacher_taps: tuple[int, ...]
    teacher_width: int
    teacher_prefix: int
    class_token: bool
    distance: str = "l1"
    normalize: str = "l2"
    projector: str = "linear"
    bias: bool = True
    weight: float = 1.0
    name: str = "align"
    more: "tuple[AlignmentSpec, ...]" = ()

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean distance between rows of the same shape: a scalar."""
        return feature_loss(student, teacher, distance=self.distance, normalize=self.normalize)


class DMAE(MAE):
    """MAE plus direct alignment: one projection per pair of blocks; the loss is the mean of their distances."""

    def __init__(
        self, encoder: Encoder, decoder: TokenDecoder | None, *, pixels: PixelSpec, align: AlignmentSpec
    ) -> None:
        super().__init__(encoder, decoder, pixels=pixels)
        self.align = align
        self.student_taps = tuple(dict.fromkeys(tap for spec in self.aligned for tap in spec.student_taps))
        self.projections = nn.ModuleList(
            projection(encoder.width, spec.teacher_width, kind=spec.projector, bias=spec.bias)
            for spec in self.aligned
            for _ in spec.student_taps
        )

    @property
    def aligned(self) -> tuple[AlignmentSpec, ...]:
        """Return the alignment with each teacher."""
        return (self.align, *self.align.more)

    def forward(
        self, images: Tensor, split: PatchSplit, target: BlockFeatures | None = None, *more: BlockFeatures
    ) -> Losses:
        """Return MAE's losses and `align/BLOCK` per student block. target: {teacher block: [B, Q + T, D_t]}.

        more: the same of further teachers, whose losses are `align/teacherNUMBER/BLOCK`, from 2 on.
        """
        assert target is not None
        pixels, features = self.reconstruct(images, split, self.student_taps)
        weighted, align = self.alignment_losses(self.project(features), (target, *more), split)
        return self.add_pixels(pixels, weighted, align)

    def project(self, features: BlockFeatures) -> list[Tensor]:
        """Project the student features of each pair to teacher width, teacher by teacher: [B, P + S, D_t]."""
        taps = [tap for spec in self.aligned for tap in spec.student_taps]
        return [head(features[tap]) for head, tap in zip(self.projections, taps, strict=True)]

    def alignment_losses(
        self, projected: list[Tensor], targets: Sequence[BlockFeatures], split: PatchSplit
    ) -> tuple[Tensor, Losses]:
        """Return the direct alignment of each pair at the patches that both networks see, after its weighted sum.

        With `class_token` of a teacher's spec, the class tokens are aligned too, as in DMAE. Registers are not.
        """
        rows, prefix = iter(projected), self.encoder.num_prefix
        losses: Losses = {}
        weighted = []
        for spec, target in zip(self.aligned, targets, strict=True):
            end = spec.teacher_prefix + split.num_student
            own = {
                f"{spec.name}/{s}": spec.compare(
                    _aligned(next(rows), prefix, class_token=spec.class_token),
                    _aligned(target[t][:, :end], spec.teacher_prefix, class_token=spec.class_token),
                )
                for s, t in zip(spec.student_taps, spec.teacher_taps, strict=True)
            }
            weighted.append(spec.weight * self.ramp * mean_loss(own))
            losses |= own
        return torch.stack(weighted).sum(), losses


def _aligned(rows: Tensor, prefix: int, *, class_token: bool) -> Tensor:
    """Leave out the prefix tokens, but for a class token that is wanted: [B, prefix + S, D] -> [B, 0 or 1 + S, D]."""
    if class_token and prefix > 1:
        return torch.cat([rows[:, :1], rows[:, prefix:]], dim=1)
    return rows if class_token else rows[:, prefix:]
