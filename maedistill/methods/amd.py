"""AMD (Zhao et al., CVPR 2024): the teacher sees more patches than the student; generators predict its other features.

B batch   S, T patches visible to student and teacher   P, Q prefix tokens of student and teacher   D_t teacher width
"""

from dataclasses import dataclass

from torch import Tensor, nn

from maedistill.methods.dmae import DMAE, AlignmentSpec
from maedistill.methods.mae import BlockFeatures, Losses, PixelSpec, mean_loss
from maedistill.models.decoder import Generator, TokenDecoder
from maedistill.models.encoder import Encoder
from maedistill.models.masking import PatchSplit


@dataclass(frozen=True)
class GeneratorSpec:
    """The generators, one per pair of blocks, of teacher width, and the weight of what they predict."""

    num_heads: int
    depth: int = 2
    weight: float = 1.0
    pos_embed: str = "sincos2d"


class AMD(DMAE):
    """DMAE's terms plus generated alignment: one generator per pair of blocks reads the pair's projected rows."""

    def __init__(
        self,
        encoder: Encoder,
        decoder: TokenDecoder,
        *,
        pixels: PixelSpec,
        align: AlignmentSpec,
        generate: GeneratorSpec,
    ) -> None:
        super().__init__(encoder, decoder, pixels=pixels, align=align)
        self.generate = generate
        self.generators = nn.ModuleList(
            Generator(
                align.teacher_width,
                depth=generate.depth,
                num_heads=generate.num_heads,
                grid=encoder.grid,
                pos_embed=generate.pos_embed,
            )
            for _ in align.student_taps
        )

    def forward(self, images: Tensor, split: PatchSplit, target: BlockFeatures | None = None) -> Losses:
        """Return DMAE's losses and `generate/BLOCK` per student block. target: {teacher block: [B, Q + T, D_t]}."""
        assert target is not None
        pixels, features = self.reconstruct(images, split, self.align.student_taps)
        projected = self.project(features)
        align = self.alignment_losses(projected, target, split)
        generate = self.generation_losses(projected, target, split)
        loss = self.pixels.weight * pixels + self.align.weight * mean_loss(align)
        loss = loss + self.generate.weight * mean_loss(generate)
        return {"loss": loss, "pixels": pixels, **align, **generate}

    def generation_losses(self, projected: list[Tensor], target: BlockFeatures, split: PatchSplit) -> Losses:
        """Return the generated alignment of each pair at patches that only the teacher sees, without prefix tokens."""
        start = self.align.teacher_prefix + split.num_student
        losses: Losses = {}
        for i, (s, t) in enumerate(zip(self.align.student_taps, self.align.teacher_taps, strict=True)):
            rows = self.generators[i](projected[i][:, self.encoder.num_prefix :], split)  # [B, T - S, D_t]
            losses[f"generate/{s}"] = self.distance(rows, target[t][:, start:])
        return losses
