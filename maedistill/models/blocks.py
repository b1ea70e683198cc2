"""Building blocks of networks: transformer blocks, their queries, keys and values, cross-attention, and projections.

Blocks use their weights only by calling submodules, because ZeRO 3 gathers parameters when a submodule is called.

    B batch   R rows   Q rows that are returned   C context rows   W width   h heads   d width of a head
"""

from functools import partial
from typing import Any

from einops import rearrange
from timm.layers import Attention, Mlp
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # as in MAE, DMAE and AMD


class TransformerBlock(Block):
    """timm's Block with the papers' settings: MLP ratio 4, qkv bias."""

    attn: Attention

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=LayerNorm)  # type: ignore[arg-type]

    def forward(self, x: Tensor, *, first: int = 0) -> Tensor:  # type: ignore[override]
        """Return rows `first` and after of the block's output: [B, R, W] -> [B, Q, W] with Q = R - first.

        Earlier rows serve as keys and values only. In a last block whose earlier rows are not used, this saves their
        attention, projection and MLP; the returned rows are the same.
        """
        if not first:
            return super().forward(x)
        q, k, v = queries_keys_values(self, x)
        attended = F.scaled_dot_product_attention(q[:, :, first:], k, v)  # [B, h, Q, d]
        x = x[:, first:] + self.attn.proj(rearrange(attended, "b h q d -> b q (h d)"))
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """Cross-attention from rows to a context, then an MLP, with a norm before each (CrossMAE, Fu et al., 2024).

    The rows do not attend to each other.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm_context, self.norm2 = LayerNorm(width), LayerNorm(width), LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = Mlp(width, hidden_features=4 * width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Update the rows from the context: [B, Q, W], context [B, C, W] -> [B, Q, W]."""
        q = rearrange(self.query(self.norm1(x)), "b q (h d) -> b h q d", h=self.num_heads)
        key_value = self.key_value(self.norm_context(context))  # [B, C, 2W]
        k, v = rearrange(key_value, "b c (two h d) -> two b h c d", two=2, h=self.num_heads)
        attended = F.scaled_dot_product_attention(q, k, v)  # [B, h, Q, d]
        x = x + self.proj(rearrange(attended, "b h q d -> b q (h d)"))
        return x + self.mlp(self.norm2(x))


def has_plain_attention(block: nn.Module) -> bool:
    """Return whether `block` is timm's own, with one linear qkv over its whole width, as needed below."""
    projection = getattr(block.attn, "qkv", None) if type(block) is Block else None
    return isinstance(projection, nn.Linear) and projection.out_features == 3 * projection.in_features


def queries_keys_values(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute the queries, keys and values of timm's `block` from its input: [B, R, W] -> [B, h, R, d] each."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(x))  # [B, R, 3W]
    q, k, v = rearrange(qkv, "b r (three h d) -> three b h r d", three=3, h=attention.num_heads)
    return attention.q_norm(q), attention.k_norm(k), v


def has_mlp_branch(block: nn.Module) -> bool:
    """Return whether `block` is timm's own, with an MLP after its attention and a norm before each, as needed below."""
    return type(block) in (Block, EvaBlock)


def attention_and_mlp(block: Any, x: Tensor, **rotations: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows after the attention of timm's `block`, and what its MLP adds to them: [B, R, W] each.

    Their sum is the block's output, as in evaluation: without stochastic depth.
    """

    def scaled(rows: Tensor, number: int) -> Tensor:
        if isinstance(block, Block):
            return getattr(block, f"ls{number}")(rows)
        gamma = getattr(block, f"gamma_{number}")
        return rows if gamma is None else gamma * rows

    x = x + scaled(block.attn(block.norm1(x), **rotations), 1)
    return x, scaled(block.mlp(block.norm2(x)), 2)


def projection(in_width: int, out_width: int, *, kind: str, bias: bool = True) -> nn.Module:
    """Build a map of features: one `linear` layer, or an `mlp` with one normed hidden layer of the output's width."""
    linear = nn.Linear(in_width, out_width, bias=bias)
    if kind == "linear":
        return linear
    assert kind == "mlp"
    return nn.Sequential(linear, LayerNorm(out_width), nn.GELU(), nn.Linear(out_width, out_width, bias=bias))
