"""Token relations in pre-training (after TinyMIM, Ren et al., CVPR 2023): MAE plus a loss on relations between tokens.

Relations replace DMAE's features, and no projection is needed. Both networks see the student's patches. TinyMIM itself
sees all patches and predicts no pixels: `masks.student_keep_ratio=1 pixels.weight=0`.

B batch   S visible patches   P, Q prefix tokens of student and teacher   H heads   d width of a head
"""

from dataclasses import dataclass

from torch import Tensor

from maedistill.losses.relations import token_relations
from maedistill.methods.mae import MAE, BlockFeatures, Losses, PixelSpec, mean_loss
from maedistill.models.decoder import TokenDecoder
from maedistill.models.encoder import Encoder
from maedistill.models.masking import PatchSplit


@dataclass(frozen=True)
class RelationSpec:
    """Relations of pairs of blocks, one student tap with one teacher tap.

    num_heads: for each pair, the heads that both widths are split into; in the paper the teacher's own number.
    """

    student_taps: tuple[int, ...]
    teacher_taps: tuple[int, ...]
    teacher_prefix: int
    num_heads: tuple[int, ...]
    weight: float = 1.0


class TinyMIM(MAE):
    """MAE plus, for each pair of blocks, a loss on query-key and value-value relations. Prefix tokens are left out."""

    def __init__(
        self, encoder: Encoder, decoder: TokenDecoder | None, *, pixels: PixelSpec, relations: RelationSpec
    ) -> None:
        super().__init__(encoder, decoder, pixels=pixels)
        self.relations = relations

    def forward(self, images: Tensor, split: PatchSplit, target: BlockFeatures | None = None) -> Losses:
        """Return MAE's losses and `align/BLOCK/qk` and `align/BLOCK/vv` per student block, whose sum enters the loss.

        target: queries, keys and values {teacher block: [3, B, H, Q + S, d]}.
        """
        assert target is not None
        pixels, features = self.reconstruct(images, split, relations=self.relations.student_taps)
        align = self.relation_losses(features, target)
        return self.add_pixels(pixels, self.relations.weight * self.ramp * 2 * mean_loss(align), align)

    def relation_losses(self, features: BlockFeatures, target: BlockFeatures) -> Losses:
        """Return the divergences of each pair. features: the student's, {block: [3, B, H, P + S, d]}."""
        spec = self.relations
        losses: Losses = {}
        for s, t, num_heads in zip(spec.student_taps, spec.teacher_taps, spec.num_heads, strict=True):
            student = features[s][..., self.encoder.num_prefix :, :]  # [3, B, H, S, d]
            teacher = target[t][..., spec.teacher_prefix :, :]
            parts = token_relations(student.unbind(0), teacher.unbind(0), num_heads=num_heads)
            losses |= {f"align/{s}/qk": parts.qk, f"align/{s}/vv": parts.vv}
        return losses
