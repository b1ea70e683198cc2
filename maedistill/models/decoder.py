"""Light networks that predict at patches which the student has not seen; they are discarded after pre-training.

`TokenDecoder` predicts pixels, as in MAE (He et al., 2022, section 3): a small ViT over visible and hidden rows. In
`CrossDecoder` (after CrossMAE, Fu et al., 2024) hidden rows attend to the visible ones but not to each other. It costs
less, and the prediction of a patch does not depend on which other patches are predicted. AMD's `Generator` predicts
features.

    B batch   N patches   S, T visible to student and teacher   H predicted, of the N - S hidden   P prefix tokens
    D encoder width   W own width   p patch side
"""

from typing import Any

import torch
from torch import Tensor, nn

from maedistill.models.blocks import CrossBlock, LayerNorm, TransformerBlock
from maedistill.models.masking import PatchSplit
from maedistill.models.patches import gather_rows, position_table


class TokenDecoder(nn.Module):
    """A small ViT over the visible and the predicted patches; hidden patches that are not predicted are left out."""

    block: type[nn.Module] = TransformerBlock
    pos_embed: Tensor

    def __init__(
        self,
        in_width: int,
        *,
        width: int,
        depth: int,
        num_heads: int,
        grid: int,
        patch_size: int,
        num_prefix: int,
        bias: bool = True,
        pos_embed: str = "sincos2d",
    ) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.embed = nn.Linear(in_width, width, bias=bias)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        table = position_table(pos_embed, grid=grid, width=width, num_prefix=num_prefix)
        self.register_buffer("pos_embed", table)  # [1, P + N, W]
        self.blocks = nn.ModuleList(self.block(width, num_heads) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, patch_size**2 * 3)

    def forward(self, tokens: Tensor, split: PatchSplit, hidden: Tensor | None = None) -> Tensor:
        """Predict pixel targets: tokens [B, P + S, D] -> [B, H, p*p*3], in the order of `hidden`.

        hidden: ids of the patches to predict, int64 [B, H]; by default all that `split` hides from the student.
        """
        rows = self.rows(tokens, split, hidden, first=self.num_prefix + split.num_student)  # [B, H, W]
        return self.head(self.norm(rows))

    def rows(self, tokens: Tensor, split: PatchSplit, hidden: Tensor | None = None, *, first: int = 0) -> Tensor:
        """Return rows `first` and after of the last block, [B, P + S + H - first, W]: prefix, visible, hidden."""
        x = torch.cat(self.inputs(tokens, split, hidden), dim=1)  # [B, P + S + H, W]
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x, first=first)

    def inputs(self, tokens: Tensor, split: PatchSplit, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return embedded tokens and mask tokens, with positions added: [B, P + S, W] and [B, H, W]."""
        prefix, table = self.pos_embed[:, : self.num_prefix], self.pos_embed[:, self.num_prefix :]
        positions = torch.cat([prefix.expand(len(tokens), -1, -1), gather_rows(table, split.student)], dim=1)
        mask_tokens = self.mask_token + gather_rows(table, split.hidden if hidden is None else hidden)
        return self.embed(tokens) + positions, mask_tokens


class CrossDecoder(TokenDecoder):
    """Hidden rows attend to visible rows only. Each block has its own keys and values of the encoder's output."""

    block = CrossBlock

    def forward(
        self, tokens: Tensor, split: PatchSplit, hidden: Tensor | None = None, *, num_pixels: int | None = None
    ) -> Any:
        """Predict as `TokenDecoder` does; a patch's prediction does not depend on which others are in `hidden`.

        num_pixels: predict the pixels of the first so many of `hidden` only, and return these predictions, None without
        any, and the rows of all, [B, H, W].
        """
        context, rows = self.inputs(tokens, split, hidden)
        for block in self.blocks:
            rows = block(rows, context)  # [B, H, W]
        rows = self.norm(rows)
        if num_pixels is None:
            return self.head(rows)
        return (self.head(rows[:, :num_pixels]) if num_pixels else None), rows


class Generator(nn.Module):
    """Predicts the teacher's features at patches that only the teacher sees (AMD, section 3.3).

    Its input is the projected student rows and one mask token per missing patch, all with positions. Its output rows
    are those of the last block, without a final norm.
    """

    pos_embed: Tensor

    def __init__(self, width: int, *, depth: int, num_heads: int, grid: int, pos_embed: str = "sincos2d") -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", position_table(pos_embed, grid=grid, width=width))  # [1, N, W]
        self.blocks = nn.ModuleList(TransformerBlock(width, num_heads) for _ in range(depth))

    def forward(self, projected: Tensor, split: PatchSplit) -> Tensor:
        """Predict rows `order[:, S:T]` from the projected student rows: [B, S, W] -> [B, T - S, W]."""
        missing = split.num_teacher - split.num_student
        mask_tokens = self.mask_token.expand(len(projected), missing, -1).to(projected.dtype)
        x = torch.cat([projected, mask_tokens], dim=1) + gather_rows(self.pos_embed, split.teacher)  # [B, T, W]
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x, first=split.num_student)
