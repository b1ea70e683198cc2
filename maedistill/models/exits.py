"""Exits of a ViT: heads on shallower blocks, so that one network can be used at several depths.

An exit has the layers that follow the blocks in timm's VisionTransformer: norm, pooling, fc_norm, classifier; before
them, if asked, a block of its own. So a network that ends at an exit is itself a timm VisionTransformer of fewer blocks
(`ending_at`), with the same outputs.

B batch   P prefix tokens   N patches   D width   C classes
"""

import copy

from timm.layers import global_pool_nlc
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

LAYERS = ("norm", "fc_norm", "head")  # of a ViT, after its blocks


class ExitHead(nn.Module):
    """The layers after a block, of the same kinds as the network's own and with parameters of their own."""

    def __init__(self, vit: VisionTransformer, *, own_block: bool = False) -> None:
        """Copy the layers. own_block: a block too, of the kind of the network's last one."""
        super().__init__()
        self.block = copy.deepcopy(vit.blocks[-1]) if own_block else None
        self.norm, self.fc_norm, self.head = (copy.deepcopy(getattr(vit, name)) for name in LAYERS)
        self.global_pool, self.num_prefix = vit.global_pool, vit.num_prefix_tokens

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features that the classifier reads, [B, D], and its logits, [B, C], of tokens [B, P + N, D]."""
        if self.block is not None:
            tokens = self.block(tokens)
        pooled = global_pool_nlc(self.norm(tokens), pool_type=self.global_pool, num_prefix_tokens=self.num_prefix)
        features = self.fc_norm(pooled)
        return features, self.head(features)


def ending_at(vit: VisionTransformer, block: int, head: ExitHead) -> VisionTransformer:
    """Return the network that ends after `block`, which counts from 0. It shares the weights of both."""
    cut = copy.copy(vit)
    cut._modules = dict(vit._modules)  # the copy's own: setting a layer must not change `vit`
    cut.blocks = nn.Sequential(*vit.blocks[: block + 1], *([head.block] if head.block is not None else []))
    for name in LAYERS:
        setattr(cut, name, getattr(head, name))
    return cut


def exit_weights(weights: dict[str, Tensor], *, head: dict[str, Tensor], block: int) -> dict[str, Tensor]:
    """Return the state dict of `ending_at(vit, block, head)`, of those of the network and of the head."""
    deeper = tuple(f"blocks.{i}." for i in range(block + 1, len(weights)))
    replaced = tuple(f"{name}." for name in LAYERS)
    kept = {key: value for key, value in weights.items() if not key.startswith((*deeper, *replaced))}
    own = f"blocks.{block + 1}."
    return kept | {own + key.removeprefix("block.") if key.startswith("block.") else key: head[key] for key in head}
