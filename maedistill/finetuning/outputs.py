"""Outputs of a network on a batch: logits, pooled features, features by depth, attention, queries, keys and values.

    network, normalised images [B, 3, s, s], RequestedOutputs -> Outputs, a flat dict of tensors by name:

    logits            [B, C]           embedding        [B, D]          tokens   [B, P + N, D], of a plain ViT
    features/DEPTH    [B, D, h, w]     attention/BLOCK  [B, H, h, w]
    query/BLOCK, key/BLOCK, value/BLOCK                 [B, H, N, d], of patch tokens

Plain timm ViTs, student and teacher alike, are run block by block here. All other networks give features through timm's
`forward_intermediates`. No timm module is changed and no hook is registered. Depths count from 0.

B batch   C classes   D width   P prefix tokens   N = h w patches   H heads   d width of a head
"""

from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maedistill.models.attention import has_plain_attention, queries_keys_values

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class RequestedOutputs:
    """The outputs requested of a network. features: depths; attention and relations: blocks of a ViT."""

    logits: bool = False
    embedding: bool = False
    tokens: bool = False
    features: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    relations: tuple[int, ...] = ()

    @property
    def to_the_end(self) -> bool:
        """Return whether the whole network has to run, not only the part up to the deepest features."""
        return self.logits or self.embedding or self.tokens

    def ends_before(self, block: int) -> bool:
        """Return whether a ViT's `block` need not run: attention and relations need only a block's input."""
        deeper = max((-1, *self.features, *(i - 1 for i in (*self.attention, *self.relations))))
        return not self.to_the_end and block > deeper


@dataclass(frozen=True)
class FeatureInfo:
    """The features that a network can give. channels, grids: by depth, empty if there are none by depth.

    num_heads: by block of a ViT, 0 without plain attention. embedding: width of the pooled features, 0 if none.
    """

    channels: tuple[int, ...]
    grids: tuple[int, ...]
    num_heads: tuple[int, ...]
    embedding: int


def is_plain_vit(network: nn.Module) -> bool:
    """Return whether `network` is a plain VisionTransformer, whose forward pass `_walk` reproduces."""
    own = VisionTransformer.forward_features
    return isinstance(network, VisionTransformer) and type(network).forward_features is own


def view(network: nn.Module, images: Tensor, wanted: RequestedOutputs) -> Outputs:
    """Return the `wanted` outputs of a network on normalised images [B, 3, s, s]; deeper layers do not run."""
    seen, last = (_walk if is_plain_vit(network) else _intermediates)(network, images, wanted)
    if wanted.tokens:
        seen["tokens"] = last
    if wanted.logits:
        seen["logits"] = network.forward_head(last)
    if wanted.embedding:
        seen["embedding"] = _pooled(network, last)
    return seen


@torch.no_grad()
def anatomy(network: nn.Module, *, image_size: int) -> FeatureInfo:
    """Return the features that `network` can give at `image_size`, found with one black image."""
    image = next(network.parameters()).new_zeros(1, 3, image_size, image_size)
    if is_plain_vit(network):
        depth, grid = len(network.blocks), network.patch_embed.grid_size[0]
        num_heads = tuple(block.attn.num_heads if has_plain_attention(block) else 0 for block in network.blocks)
        channels, grids = (network.embed_dim,) * depth, (grid,) * depth
    else:
        maps = _all_maps(network, image)
        channels, grids = (tuple(m.shape[axis] for m in maps) for axis in (1, 2))
        num_heads = ()
    return FeatureInfo(channels, grids, num_heads, _embedding_width(network, image))


def received_attention(query: Tensor, key: Tensor) -> Tensor:
    """Return how much attention each token receives, averaged over queries: [B, H, M, d] each -> [B, H, M]."""
    return (query @ key.mT * query.shape[-1] ** -0.5).float().softmax(dim=-1).mean(dim=2)


def _walk(vit: VisionTransformer, images: Tensor, wanted: RequestedOutputs) -> tuple[Outputs, Tensor]:
    """Return a plain ViT's outputs and its last tokens [B, P + N, D], normed if the whole network ran."""
    seen: Outputs = {}
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))  # [B, P + N, D]
    for i, block in enumerate(vit.blocks):
        if i in wanted.attention or i in wanted.relations:
            seen |= _attention_views(vit, i, x, wanted)
        if wanted.ends_before(i):
            break
        recompute = vit.grad_checkpointing and torch.is_grad_enabled()
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        if i in wanted.features:
            seen[f"features/{i}"] = _on_grid(vit, x[:, vit.num_prefix_tokens :].mT)  # [B, D, h, w]
    return seen, vit.norm(x) if wanted.to_the_end else x


def _attention_views(vit: VisionTransformer, i: int, x: Tensor, wanted: RequestedOutputs) -> Outputs:
    """Return attention, queries, keys and values of block `i`, whose input is the tokens x [B, P + N, D]."""
    seen: Outputs = {}
    parts = queries_keys_values(vit.blocks[i], x)
    if i in wanted.attention:
        received = received_attention(*parts[:2])[:, :, vit.num_prefix_tokens :]  # [B, H, N]
        seen[f"attention/{i}"] = _on_grid(vit, received)
    if i in wanted.relations:
        for name, part in zip(("query", "key", "value"), parts, strict=True):
            seen[f"{name}/{i}"] = part[:, :, vit.num_prefix_tokens :]
    return seen


def _on_grid(vit: VisionTransformer, rows: Tensor) -> Tensor:
    """Arrange patches on their grid: [B, D, N] -> [B, D, h, w]."""
    return rows.unflatten(-1, tuple(vit.patch_embed.grid_size))


def _intermediates(network: nn.Module, images: Tensor, wanted: RequestedOutputs) -> tuple[Outputs, Tensor]:
    """Return the outputs of any other timm network, and its head's input, usable only with `wanted.to_the_end`."""
    assert not wanted.attention and not wanted.relations
    depths = sorted({*wanted.features})
    if not depths:
        return {}, network.forward_features(images)
    if wanted.to_the_end:
        keywords = {"output_fmt": "NCHW", "stop_early": False}  # Hiera stops early by default
        last, maps = network.forward_intermediates(images, indices=depths, **keywords)
    else:
        keywords = {"output_fmt": "NCHW", "stop_early": True, "intermediates_only": True}
        maps = network.forward_intermediates(images, indices=depths, **keywords)
        last = maps[-1]
    return {f"features/{depth}": found for depth, found in zip(depths, maps, strict=True)}, last


def _all_maps(network: nn.Module, image: Tensor) -> list[Tensor]:
    """Return features of all depths that timm lists, [1, D, h, w] each; empty for a network without square maps."""
    if not hasattr(network, "forward_intermediates"):
        return []
    maps = network.forward_intermediates(image, output_fmt="NCHW", intermediates_only=True)
    return maps if all(found.ndim == 4 and found.shape[2] == found.shape[3] for found in maps) else []


def _pooled(network: nn.Module, last: Tensor) -> Tensor:
    """Return the classifier's input, [B, D]; for an encoder that does not pool, the mean of its patch tokens."""
    pooled = network.forward_head(last, pre_logits=True)
    return pooled[:, network.num_prefix_tokens :].mean(1) if pooled.ndim == 3 else pooled


def _embedding_width(network: nn.Module, image: Tensor) -> int:
    """Return D of `_pooled`, 0 for a network that has no such features."""
    try:
        pooled = _pooled(network, network.forward_features(image))
    except (AttributeError, TypeError):  # no such method, or one without `pre_logits`
        return 0
    return pooled.shape[1] if pooled.ndim == 2 else 0
