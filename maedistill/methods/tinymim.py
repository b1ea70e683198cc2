"""Token relations in pre-training (after TinyMIM, Ren et al., CVPR 2023): MAE plus a loss on relations between tokens.

TinyMIM sees all patches and predicts no pixels. Here both networks see the student's patches, as in DMAE, and the pixel
loss stays: relations replace DMAE's features, and no projection is needed.

B batch   S visible patches   P, Q prefix tokens of student and teacher   H heads   d width of a head
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from maedistill.losses.relations import token_relations
from maedistill.methods.dmae import mean
from maedistill.methods.mae import MAE, Losses, Target
from maedistill.models.masking import PatchSplit


class TinyMIM(MAE):
    """MAE plus, for each pair of blocks, a loss on query-key and value-value relations. Prefix tokens are left out.

    num_heads: for each pair, the heads that both widths are split into; in the paper the teacher's own number.
    """

    def __init__(
        self,
        *args: Any,
        student_taps: Sequence[int],
        teacher_taps: Sequence[int],
        teacher_prefix: int,
        num_heads: Sequence[int],
        align_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)
        self.teacher_prefix, self.num_heads, self.align_weight = teacher_prefix, tuple(num_heads), align_weight

    def forward(self, images: Tensor, split: PatchSplit, target: Target | None = None) -> Losses:
        """Return MAE's losses and `align/BLOCK/qk` and `align/BLOCK/vv` per student block, whose sum enters the loss.

        target: queries, keys and values {teacher block: [3, B, H, Q + S, d]}.
        """
        assert target is not None
        pixels, found = self.reconstruct(images, split, relations=self.student_taps)
        align = self.align(found, target)
        loss = self.pixel_weight * pixels + self.align_weight * 2 * mean(align)
        return {"loss": loss, "pixels": pixels, **align}

    def align(self, found: Target, target: Target) -> Losses:
        """Return the divergences of each pair. found: the student's, {block: [3, B, H, P + S, d]}."""
        losses = {}
        for s, t, num_heads in zip(self.student_taps, self.teacher_taps, self.num_heads, strict=True):
            student, teacher = found[s][..., self.encoder.num_prefix :, :], target[t][..., self.teacher_prefix :, :]
            parts = token_relations(student.unbind(0), teacher.unbind(0), num_heads=num_heads)
            losses |= {f"align/{s}/qk": parts.qk, f"align/{s}/vv": parts.vv}
        return losses
