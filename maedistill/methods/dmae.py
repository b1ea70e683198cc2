"""DMAE (Bai et al., CVPR 2023): MAE plus alignment of features with those of a teacher that sees the same patches.

B batch   S, T patches visible to student and teacher   P, Q prefix tokens of student and teacher   D_t teacher width
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maedistill.losses.features import feature_loss
from maedistill.methods.mae import MAE, Losses, Target
from maedistill.models.heads import projection
from maedistill.models.masking import PatchSplit


class DMAE(MAE):
    """MAE plus direct alignment: one projection per pair of blocks; the loss is the mean of their distances."""

    def __init__(
        self,
        *args: Any,
        student_taps: Sequence[int],
        teacher_taps: Sequence[int],
        teacher_width: int,
        teacher_prefix: int,
        distance: str = "l1",
        normalize: str = "l2",
        beta: float = 2.0,
        head: str = "linear",
        bias: bool = True,
        align_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)
        self.teacher_prefix, self.align_weight = teacher_prefix, align_weight
        self.distance = {"distance": distance, "normalize": normalize, "beta": beta}
        width = self.encoder.width
        self.projections = nn.ModuleList(
            projection(width, teacher_width, kind=head, bias=bias) for _ in self.student_taps
        )

    def forward(self, images: Tensor, split: PatchSplit, target: Target | None = None) -> Losses:
        """Return MAE's losses and `align/BLOCK` per student block. target: {teacher block: [B, Q + T, D_t]}."""
        assert target is not None
        pixels, tapped = self.reconstruct(images, split, self.student_taps)
        projected = self.project(tapped)
        align = self.align(projected, target, split)
        loss = self.pixel_weight * pixels + self.align_weight * mean(align)
        return {"loss": loss, "pixels": pixels, **align}

    def project(self, tapped: Target) -> list[Tensor]:
        """Project the student features of each pair to teacher width: [B, P + S, D_t]."""
        return [head(tapped[tap]) for head, tap in zip(self.projections, self.student_taps, strict=True)]

    def align(self, projected: list[Tensor], target: Target, split: PatchSplit) -> Losses:
        """Return the direct alignment of each pair at the patches that both networks see.

        Prefix tokens (class, registers) are aligned too if both networks have equally many, as in DMAE.
        """
        prefix = self.encoder.num_prefix
        skip_student, skip_teacher = (0, 0) if prefix == self.teacher_prefix else (prefix, self.teacher_prefix)
        end = self.teacher_prefix + split.num_student
        losses = {}
        for student, s, t in zip(projected, self.student_taps, self.teacher_taps, strict=True):
            losses[f"align/{s}"] = feature_loss(
                student[:, skip_student:], target[t][:, skip_teacher:end], **self.distance
            )
        return losses


def mean(losses: Losses) -> Tensor:
    """Return the mean of named scalar losses."""
    return torch.stack(list(losses.values())).mean()
