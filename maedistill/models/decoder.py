"""The light decoder: visible tokens and mask tokens in, pixels of the hidden patches out (MAE, section 3).

B batch   N patches   S visible   P prefix tokens   D encoder width   W decoder width   p patch side
"""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maedistill.masking import PatchSplit, gather_rows
from maedistill.models.positions import position_table

# timm's Block with the LayerNorm epsilon of all three papers, MLP ratio 4 and qkv bias.
TransformerBlock = partial(Block, mlp_ratio=4.0, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))


class TokenDecoder(nn.Module):
    """A small ViT over all N patches that predicts pixels for the hidden ones only."""

    def __init__(
        self,
        in_width: int,
        *,
        width: int,
        depth: int,
        heads: int,
        grid: int,
        patch_size: int,
        num_prefix: int,
        bias: bool = True,
        positions: str = "sincos2d",
    ) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.embed = nn.Linear(in_width, width, bias=bias)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        table = position_table(positions, grid=grid, width=width, num_prefix=num_prefix)
        self.register_buffer("pos_embed", table)  # [1, P + N, W]
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, patch_size**2 * 3)

    def rows(self, tokens: Tensor, split: PatchSplit) -> Tensor:
        """Decoded rows of every patch, in the order of `split.order`: tokens [B, P + S, D] -> [B, P + N, W]."""
        prefix, table = self.pos_embed[:, : self.num_prefix], self.pos_embed[:, self.num_prefix :]
        positions = torch.cat([prefix.expand(len(tokens), -1, -1), gather_rows(table, split.order)], dim=1)
        x = self.embed(tokens)  # [B, P + S, W]
        hidden = self.mask_token.expand(len(x), split.hidden.shape[1], -1).to(x.dtype)  # [B, N - S, W]
        x = torch.cat([x, hidden], dim=1) + positions  # [B, P + N, W]
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, tokens: Tensor, split: PatchSplit) -> Tensor:
        """Predicted pixel targets of the hidden patches: tokens [B, P + S, D] -> [B, N - S, p*p*3]."""
        hidden = self.rows(tokens, split)[:, self.num_prefix + split.num_student :]  # [B, N - S, W]
        return self.head(self.norm(hidden))
