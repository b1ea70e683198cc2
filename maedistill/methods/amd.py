"""AMD (Zhao et al., CVPR 2024): the teacher sees more patches than the student; generators predict its other features.

B batch   S, T patches visible to student and teacher   P, Q prefix tokens of student and teacher   D_t teacher width
"""

from typing import Any

from torch import Tensor, nn

from maedistill.losses.features import feature_loss
from maedistill.methods.dmae import DMAE, mean
from maedistill.methods.mae import Losses, Target
from maedistill.models.heads import Generator
from maedistill.models.masking import PatchSplit


class AMD(DMAE):
    """DMAE's terms plus generated alignment: one generator per pair of blocks reads the pair's projected rows."""

    def __init__(
        self,
        *args: Any,
        teacher_width: int,
        generator_depth: int = 2,
        generator_heads: int | None = None,
        generate_weight: float = 1.0,
        pos_embed: str = "sincos2d",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, teacher_width=teacher_width, **kwargs)
        self.generate_weight = generate_weight
        num_heads = generator_heads or max(1, teacher_width // 64)
        self.generators = nn.ModuleList(
            Generator(
                teacher_width, depth=generator_depth, num_heads=num_heads, grid=self.encoder.grid, pos_embed=pos_embed
            )
            for _ in self.student_taps
        )

    def forward(self, images: Tensor, split: PatchSplit, target: Target | None = None) -> Losses:
        """Return DMAE's losses and `generate/BLOCK` per student block. target: {teacher block: [B, Q + T, D_t]}."""
        assert target is not None
        pixels, tapped = self.reconstruct(images, split, self.student_taps)
        projected = self.project(tapped)
        align = self.align(projected, target, split)
        generate = self.generate(projected, target, split)
        loss = self.pixel_weight * pixels + self.align_weight * mean(align) + self.generate_weight * mean(generate)
        return {"loss": loss, "pixels": pixels, **align, **generate}

    def generate(self, projected: list[Tensor], target: Target, split: PatchSplit) -> Losses:
        """Return the generated alignment of each pair at patches that only the teacher sees, without prefix tokens."""
        start = self.teacher_prefix + split.num_student
        losses = {}
        for i, (s, t) in enumerate(zip(self.student_taps, self.teacher_taps, strict=True)):
            rows = self.generators[i](projected[i][:, self.encoder.num_prefix :], split)  # [B, T - S, D_t]
            losses[f"generate/{s}"] = feature_loss(rows, target[t][:, start:], **self.distance)
        return losses
