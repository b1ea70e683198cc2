"""Frozen features from any source: a vector or a map per image from any network that timm builds, at any depth.

    open_backbone("runs/dmae_s", block=8)  -> Network whose module is a `Backbone`: images -> features [B, D]
    open_dense("runs/dmae_s", blocks=[8])  -> Network whose module is a `DenseBackbone`: images -> maps [B, h, w, D]

Without a block, the features are a transformer's patch tokens after its final norm, or another network's feature map
as pooled by its own head. (A ViT whose norm stands after the pooling, as that of a run that was fine-tuned with
student.global_pool=avg, has none before it, nor has one of a file without it.) With a block, they are the output of
that block, before any norm. Blocks are 0-based, as in timm's `feature_info`; the blocks of a convolutional network are
its stages.

    B batch   N patches   P prefix tokens (class, registers)   D width   s image side   h, w a map's sides
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from maedistill.errors import ConfigError
from maedistill.models.maps import feature_maps, map_shapes, resample
from maedistill.models.vits import TimmModel
from maedistill.weights.network import Network
from maedistill.weights.open_network import open_network

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


class DenseBackbone(nn.Module):
    """Map normalised images [B, 3, s, s] to maps [B, h, w, D]: the outputs of some blocks, side by side in D.

    Maps of several sides are resampled to the largest. norm: after the final norm of a ViT.
    """

    def __init__(self, network: TimmModel, *, blocks: Sequence[int], norm: bool) -> None:
        super().__init__()
        self.network: TimmModel = network
        self.blocks, self.norm = list(blocks), norm

    def forward(self, images: Tensor) -> Tensor:
        """Compute the maps of a batch."""
        maps = [*feature_maps(self.network, images, self.blocks, norm=self.norm).values()]  # of [B, D, h, w]
        side = max(features.shape[-1] for features in maps)
        return torch.cat([resample(features, side) for features in maps], dim=1).permute(0, 2, 3, 1)

    def describe(self) -> str:
        """Describe which features these are."""
        return f"patches of block {', '.join(map(str, self.blocks))}{', after the final norm' if self.norm else ''}"


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
            raise ConfigError(
                f"timm gives no access to the blocks of {opened.name}, a {type(network).__name__}",
                "name another network, or use this one's last features: leave out the block",
            )
        block = _block_number(block, len(network.feature_info), opened.name)
    if pool == "class" and not (has_tokens(network) and getattr(network, "cls_token", None) is not None):
        raise ConfigError(f"{opened.name} has no class token", "leave out --pool class: the mean works for any network")
    backbone = replace(opened, module=Backbone(network, block=block, pool=pool))
    features = backbone.output()
    if features.ndim != 2 or len(features) != 1:
        raise ConfigError(
            f"{backbone.name} gives {tuple(features.shape)} for one image, not one vector",
            "name a block (--block), whose output is pooled here",
        )
    return backbone


def open_dense(
    source: str, *, weights: str = "model", image_size: int | None = None, blocks: Sequence[int] | None = None
) -> Network:
    """Open any network as `open_backbone` does, and wrap it as a `DenseBackbone`.

    blocks: from 0, or from -1 backwards, numbered as in `models/maps.py`; by default the last, of a ViT after the final
    norm. Raises ConfigError for a missing block, or a network without square maps; also the errors of `open_network`.
    """
    opened = open_network(source, weights=weights, image_size=image_size)
    count = len(map_shapes(opened.module, name=opened.name, image_size=opened.size))
    numbers = [_block_number(block, count, opened.name) for block in blocks or [-1]]
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"--blocks names block {max(numbers, key=numbers.count)} twice", "name each once")
    last = getattr(opened.module, "norm", None)  # nothing, where another one stands after the pooling
    norm = not blocks and has_tokens(opened.module) and not isinstance(last, nn.Identity)
    return replace(opened, module=DenseBackbone(opened.module, blocks=numbers, norm=norm))


def _block_number(block: int, count: int, name: str) -> int:
    """Return the number from 0 of a block that may be counted backwards. Raises ConfigError if it does not exist."""
    if not -count <= block < count:
        raise ConfigError(
            f"{name} has no block {block}: there are {count}, 0 to {count - 1}", "name one of them with --block"
        )
    return block % count


def has_tokens(network: TimmModel) -> bool:
    """Return whether timm returns patch tokens and prefix tokens separately, as it does for variants of ViT."""
    method = getattr(network, "forward_intermediates", None)
    return method is not None and "return_prefix_tokens" in inspect.signature(method).parameters
