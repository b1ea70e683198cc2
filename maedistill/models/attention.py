"""Queries, keys and values of a ViT block's attention, recomputed from the block's input and its own weights.

B batch   M tokens   D width   H heads   d width of a head
"""

from timm.models.vision_transformer import Block
from torch import Tensor, nn


def has_plain_attention(block: nn.Module) -> bool:
    """Return whether `block` is timm's own, with one linear qkv over its whole width, as needed below."""
    projection = getattr(block.attn, "qkv", None) if type(block) is Block else None
    return isinstance(projection, nn.Linear) and projection.out_features == 3 * projection.in_features


def queries_keys_values(block: Block, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute the queries, keys and values of `block` from its input [B, M, D]: [B, H, M, d] each."""
    attention = block.attn
    batch, count, _ = tokens.shape
    together = attention.qkv(block.norm1(tokens)).reshape(batch, count, 3, attention.num_heads, -1)
    query, key, value = together.permute(2, 0, 3, 1, 4).unbind(0)
    return attention.q_norm(query), attention.k_norm(key), value
