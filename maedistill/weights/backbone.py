"""Frozen features from any source: one vector per image from any network that timm builds, at any depth.

    open_backbone("runs/dmae_s", block=8)  -> Network whose module is a `Backbone`: images -> features [B, D]

Without a block, the features are a transformer's patch tokens after its final norm, or another network's feature map
as pooled by its own head. With a block, they are the output of that block, before any norm. Blocks are 0-based, as in
timm's `feature_info`; the blocks of a convolutional network are its stages.

    B batch   N patches   P prefix tokens (class, registers)   D width   s image side   h, w a map's sides
"""

import inspect
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from maedistill.errors import ConfigError
from maedistill.models.encoder import TimmModel
from maedistill.weights.network import Network, open_network

Pool = Literal["mean", "class"]


class Backbone(nn.Module):
    """Map normalised images [B, 3, s, s] to features [B, D] of a timm network.

    block: whose output to use; None for the end of the network. pool: the mean of the patch tokens, or the class token.
    """

    def __init__(self, network: TimmModel, *, block: int | None, pool: Pool) -> None:
        super().__init__()
        self.network: TimmModel = network
        self.block, self.pool, self.has_tokens = block, pool, has_tokens(network)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of a batch."""
        network = self.network
        if self.block is None:
            output = network.forward_features(images)
            if not self.has_tokens:
                return network.forward_head(output, pre_logits=True)
            prefix, patches = output.tensor_split([network.num_prefix_tokens], dim=1)  # of [B, P + N, D]
        else:
            keywords = {"output_fmt": "NLC", "return_prefix_tokens": True} if self.has_tokens else {}
            (output,) = network.forward_intermediates(
                images, indices=[self.block], stop_early=True, intermediates_only=True, **keywords
            )
            if not self.has_tokens:
                return output.mean((2, 3))  # of [B, D, h, w]
            patches, prefix = output if isinstance(output, tuple) else (output, None)  # [B, N, D], [B, P, D]
        return patches.mean(1) if self.pool == "mean" else prefix[:, 0]

    def describe(self) -> str:
        """Describe which features these are."""
        depth = "the end of the network" if self.block is None else f"block {self.block}"
        return f"{'mean of the patches' if self.pool == 'mean' else 'class token'} at {depth}"


def open_backbone(
    source: str,
    *,
    weights: str = "model",
    image_size: int | None = None,
    block: int | None = None,
    pool: Pool = "mean",
) -> Network:
    """Open any network with `open_network`, with or without a classifier, and wrap it as a `Backbone`.

    block: from 0, or from -1 backwards. Raises ConfigError for a missing block, a missing class token, a network whose
    blocks timm does not expose, or one without features; also the errors of `open_network`.
    """
    opened = open_network(source, weights=weights, image_size=image_size)
    network = opened.module
    if block is not None:
        if not hasattr(network, "forward_intermediates"):
            raise ConfigError(f"timm shows no blocks of {opened.name}, a {type(network).__name__}", "leave out --block")
        count = len(network.feature_info)
        if not -count <= block < count:
            raise ConfigError(
                f"{opened.name} has no block {block}: there are {count}, 0 to {count - 1}",
                "name one of them with --block",
            )
        block %= count
    if pool == "class" and not (has_tokens(network) and getattr(network, "cls_token", None) is not None):
        raise ConfigError(
            f"{opened.name} has no class token", "leave out --pool class: the mean is there for any network"
        )
    backbone = replace(opened, module=Backbone(network, block=block, pool=pool))
    features = backbone.output()
    if features.ndim != 2 or len(features) != 1:
        raise ConfigError(
            f"{backbone.name} gives {tuple(features.shape)} for one image, not one vector",
            "name a block (--block), whose output is pooled here",
        )
    return backbone


def has_tokens(network: TimmModel) -> bool:
    """Return whether timm returns patch tokens and prefix tokens separately, as it does for variants of ViT."""
    method = getattr(network, "forward_intermediates", None)
    return method is not None and "return_prefix_tokens" in inspect.signature(method).parameters
