"""Outputs of a network on a batch: logits, pooled features, features by depth, attention, queries, keys and values.

    network, normalised images [B, 3, s, s], RequestedOutputs -> Outputs, a flat dict of tensors by name:

    logits            [B, C]           embedding        [B, D]          tokens   [B, P + N, D], of a plain ViT
    tokens/BLOCK      [B, P + N, D]
    features/DEPTH    [B, D, h, w]     attention/BLOCK  [B, H, h, w]
    query/BLOCK, key/BLOCK, value/BLOCK                 [B, H, N, d], of patch tokens

Plain timm ViTs, student and teacher alike, are run block by block. All other networks give features through timm's
`forward_intermediates`. No timm module is changed and no hook is registered. Depths count from 0.

B batch   C classes   D width   P prefix tokens   N = h w patches   H heads   d width of a head
"""

from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from maedistill.models.blocks import has_plain_attention
from maedistill.models.encoder import run_blocks
from maedistill.models.vits import TimmModel

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class RequestedOutputs:
    """The outputs requested of a network. features: depths; blocks (their tokens), attention, relations: of a ViT."""

    logits: bool = False
    embedding: bool = False
    tokens: bool = False
    features: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    relations: tuple[int, ...] = ()

    @property
    def to_the_end(self) -> bool:
        """Return whether the whole network has to run, not only the part up to the deepest features."""
        return self.logits or self.embedding or self.tokens


@dataclass(frozen=True)
class FeatureInfo:
    """The outputs that a network can give, for images of `image_size`. name: the network's, for errors.

    channels, grids: by depth, empty if there are no features by depth. num_heads: by block of a ViT, 0 without plain
    attention. embedding: width of the pooled features, 0 if there are none. register_token: index of the first register
    token among the prefix tokens; None without one. vit, exits: of a student that is a plain ViT, the network and the
    blocks of its exits.
    """

    name: str
    image_size: int
    num_classes: int
    channels: tuple[int, ...]
    grids: tuple[int, ...]
    num_heads: tuple[int, ...]
    embedding: int
    register_token: int | None
    vit: VisionTransformer | None = None
    exits: tuple[int, ...] = ()


def is_plain_vit(network: TimmModel) -> bool:
    """Return whether `network` is a VisionTransformer whose forward pass `_vit_outputs` reproduces."""
    own = VisionTransformer.forward_features
    return isinstance(network, VisionTransformer) and type(network).forward_features is own


def forward_outputs(network: TimmModel, images: Tensor, requested: RequestedOutputs) -> Outputs:
    """Return the `requested` outputs of a network on normalised images [B, 3, s, s]; deeper layers do not run."""
    if not hasattr(network, "forward_head"):  # no model of timm: a caller's module, whose logits are all that is known
        assert requested == RequestedOutputs(logits=True)
        return {"logits": network(images)}
    outputs, last = (_vit_outputs if is_plain_vit(network) else _intermediates)(network, images, requested)
    if requested.tokens:
        outputs["tokens"] = last
    if requested.logits:
        outputs["logits"] = network.forward_head(last)
    if requested.embedding:
        outputs["embedding"] = _pooled(network, last)
    return outputs


@torch.no_grad()
def feature_info(network: TimmModel, *, name: str, image_size: int) -> FeatureInfo:
    """Return the outputs that `network` can give at `image_size`, found with one black image."""
    image = next(network.parameters()).new_zeros(1, 3, image_size, image_size)
    num_heads: tuple[int, ...] = ()
    register_token = None
    if is_plain_vit(network):
        depth, grid = len(network.blocks), network.patch_embed.grid_size[0]
        num_heads = tuple(block.attn.num_heads if has_plain_attention(block) else 0 for block in network.blocks)
        channels, grids = (network.embed_dim,) * depth, (grid,) * depth
        register_token = int(network.cls_token is not None) if network.reg_token is not None else None
    else:
        maps = _all_maps(network, image)
        channels, grids = (tuple(m.shape[axis] for m in maps) for axis in (1, 2))
    width = _embedding_width(network, image)
    num_classes = getattr(network, "num_classes", 0)
    return FeatureInfo(name, image_size, num_classes, channels, grids, num_heads, width, register_token)


def _vit_outputs(vit: VisionTransformer, images: Tensor, requested: RequestedOutputs) -> tuple[Outputs, Tensor]:
    """Return a plain ViT's outputs and its last tokens [B, P + N, D], normed if the whole network ran."""
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))  # [B, P + N, D]
    x, tapped, qkv = run_blocks(
        vit,
        x,
        taps=(*requested.features, *requested.blocks),
        relations=(*requested.attention, *requested.relations),
        to_last_tap=not requested.to_the_end,
    )
    prefix, grid = vit.num_prefix_tokens, tuple(vit.patch_embed.grid_size)
    outputs = {f"features/{i}": tapped[i][:, prefix:].mT.unflatten(-1, grid) for i in requested.features}
    outputs |= {f"tokens/{i}": tapped[i] for i in requested.blocks}
    for i in requested.attention:  # what each patch receives, mean over queries
        query, key, _ = qkv[i]
        query = query * query.shape[-1] ** -0.5  # before the product, which could overflow in fp16
        attention = (query @ key.mT).float().softmax(dim=-1)  # [B, H, P + N, P + N]
        outputs[f"attention/{i}"] = attention.mean(dim=2)[:, :, prefix:].unflatten(-1, grid)
    for i in requested.relations:
        for name, part in zip(("query", "key", "value"), qkv[i], strict=True):
            outputs[f"{name}/{i}"] = part[:, :, prefix:]
    return outputs, x


def _intermediates(network: TimmModel, images: Tensor, requested: RequestedOutputs) -> tuple[Outputs, Tensor]:
    """Return the outputs of any other timm network, and its head's input, usable only with `requested.to_the_end`."""
    assert not requested.blocks and not requested.attention and not requested.relations
    depths = sorted({*requested.features})
    if not depths:
        return {}, network.forward_features(images)
    stop = not requested.to_the_end
    result = network.forward_intermediates(
        images, indices=depths, output_fmt="NCHW", stop_early=stop, intermediates_only=stop
    )
    last, maps = (result[-1], result) if stop else result
    return {f"features/{depth}": one for depth, one in zip(depths, maps, strict=True)}, last


def _all_maps(network: TimmModel, image: Tensor) -> list[Tensor]:
    """Return features of all depths that timm lists, [1, D, h, w] each; empty for a network without square maps."""
    if not hasattr(network, "forward_intermediates"):
        return []
    maps = network.forward_intermediates(image, output_fmt="NCHW", intermediates_only=True)
    return maps if all(one.ndim == 4 and one.shape[2] == one.shape[3] for one in maps) else []


def _pooled(network: TimmModel, last: Tensor) -> Tensor:
    """Return the classifier's input, [B, D]; for an encoder that does not pool, the mean of its patch tokens."""
    pooled = network.forward_head(last, pre_logits=True)
    return pooled[:, network.num_prefix_tokens :].mean(1) if pooled.ndim == 3 else pooled


def _embedding_width(network: TimmModel, image: Tensor) -> int:
    """Return D of `_pooled`, 0 for a network that has no such features."""
    try:
        pooled = _pooled(network, network.forward_features(image))
    except (AttributeError, TypeError):  # no such method, or one without `pre_logits`
        return 0
    return pooled.shape[1] if pooled.ndim == 2 else 0
