"""Heads between student and teacher features: projections, and AMD's generators. They are discarded after pre-training.

B batch   S, T patches visible to student and teacher   D_s, D_t widths of student and teacher
"""

import torch
from torch import Tensor, nn

from maedistill.models.blocks import TransformerBlock
from maedistill.models.masking import PatchSplit, gather_rows
from maedistill.models.positions import position_table


def projection(student_width: int, teacher_width: int, *, kind: str) -> nn.Module:
    """Build the map from student to teacher width: one linear layer, or an MLP with a hidden layer of teacher width."""
    linear = nn.Linear(student_width, teacher_width)
    if kind == "linear":
        return linear
    assert kind == "mlp"
    return nn.Sequential(linear, nn.GELU(), nn.Linear(teacher_width, teacher_width))


class Generator(nn.Module):
    """Predicts the teacher's features at patches that the student has not seen (AMD, section 3.3).

    Its input is the projected student rows and one mask token per missing patch, all with positions. Its output rows
    are those of the last block, without a final norm.
    """

    pos_embed: Tensor

    def __init__(self, width: int, *, depth: int, num_heads: int, grid: int, pos_embed: str = "sincos2d") -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", position_table(pos_embed, grid=grid, width=width))  # [1, N, D_t]
        self.blocks = nn.ModuleList(TransformerBlock(width, num_heads) for _ in range(depth))

    def forward(self, projected: Tensor, split: PatchSplit) -> Tensor:
        """Predict rows `order[:, S:T]` from the projected student rows: [B, S, D_t] -> [B, T - S, D_t]."""
        missing = split.num_teacher - split.num_student
        mask_tokens = self.mask_token.expand(len(projected), missing, -1).to(projected.dtype)
        x = torch.cat([projected, mask_tokens], dim=1) + gather_rows(self.pos_embed, split.teacher)  # [B, T, D_t]
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x, first=split.num_student)
