"""DMAE (Bai et al., CVPR 2023): MAE plus alignment of features with those of a teacher that sees the same patches.

B batch   S, T patches visible to student and teacher   P, Q prefix tokens of student and teacher   D_t teacher width
"""

from dataclasses import dataclass

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

    distance, normalize, beta: of `losses.features.feature_loss`. projector, bias: of the projections.
    """

    student_taps: tuple[int, ...]
    teacher_taps: tuple[int, ...]
    teacher_width: int
    teacher_prefix: int
    distance: str = "l1"
    normalize: str = "l2"
    beta: float = 2.0
    projector: str = "linear"
    bias: bool = True
    weight: float = 1.0


class DMAE(MAE):
    """MAE plus direct alignment: one projection per pair of blocks; the loss is the mean of their distances."""

    def __init__(self, encoder: Encoder, decoder: TokenDecoder, *, pixels: PixelSpec, align: AlignmentSpec) -> None:
        super().__init__(encoder, decoder, pixels=pixels)
        self.align = align
        self.projections = nn.ModuleList(
            projection(encoder.width, align.teacher_width, kind=align.projector, bias=align.bias)
            for _ in align.student_taps
        )

    def forward(self, images: Tensor, split: PatchSplit, target: BlockFeatures | None = None) -> Losses:
        """Return MAE's losses and `align/BLOCK` per student block. target: {teacher block: [B, Q + T, D_t]}."""
        assert target is not None
        pixels, features = self.reconstruct(images, split, self.align.student_taps)
        align = self.alignment_losses(self.project(features), target, split)
        loss = self.pixels.weight * pixels + self.align.weight * self.ramp * mean_loss(align)
        return {"loss": loss, "pixels": pixels, **align}

    def project(self, features: BlockFeatures) -> list[Tensor]:
        """Project the student features of each pair to teacher width: [B, P + S, D_t]."""
        return [head(features[tap]) for head, tap in zip(self.projections, self.align.student_taps, strict=True)]

    def alignment_losses(self, projected: list[Tensor], target: BlockFeatures, split: PatchSplit) -> Losses:
        """Return the direct alignment of each pair at the patches that both networks see.

        Prefix tokens (class, registers) are aligned too if both networks have equally many, as in DMAE.
        """
        spec, prefix = self.align, self.encoder.num_prefix
        skip_student, skip_teacher = (0, 0) if prefix == spec.teacher_prefix else (prefix, spec.teacher_prefix)
        end = spec.teacher_prefix + split.num_student
        losses: Losses = {}
        for student, s, t in zip(projected, spec.student_taps, spec.teacher_taps, strict=True):
            losses[f"align/{s}"] = self.distance(student[:, skip_student:], target[t][:, skip_teacher:end])
        return losses

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean distance between rows of the same shape: a scalar."""
        spec = self.align
        return feature_loss(student, teacher, distance=spec.distance, normalize=spec.normalize, beta=spec.beta)
