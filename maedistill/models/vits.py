"""Plain ViTs of timm: build one by name and dimensions, and refuse other networks."""

import difflib
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import timm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maedistill.errors import ConfigError
from maedistill.models.meta import meta_device
from maedistill.models.patches import position_table

# Any model of timm: an nn.Module with forward_features, forward_head, pretrained_cfg ..., of no common declared class.
TimmModel: TypeAlias = Any
# ViTs without a hierarchy: with absolute positions, or timm's Eva with rotary ones (DINOv3, EVA-02, PE), or with both.
PlainViT: TypeAlias = VisionTransformer | Eva


def build_vit(
    model: str,
    *,
    image_size: int,
    pos_embed: str = "learned",
    width: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    patch_size: int | None = None,
    class_token: bool | None = None,
    register_tokens: int | None = None,
    mlp_ratio: float | None = None,
    drop_path: float | None = None,
    num_classes: int = 0,
    global_pool: str = "",
) -> PlainViT:
    """Build a randomly initialised timm `model` for square images of `image_size` pixels; by default no classifier.

    pos_embed: `sincos2d` or `sincos1d` replaces the position parameter by a fixed buffer of that table; `learned`
    keeps it; a model with rotary positions alone has none. The other dimensions override the model's own where they are
    not None. global_pool: timm's; with `avg`, the mean of the patch tokens has a norm of its own, `fc_norm`, and the
    encoder's final norm is left out.
    Raises ConfigError for a name that is not a plain ViT.
    """
    require_known(model)
    with meta_device():  # allocates and initialises nothing
        plain = require_plain_vit(timm.create_model(model, pretrained=False), model)
    own_heads: int = getattr(getattr(plain.blocks[0], "attn", None), "num_heads", 1)
    heads, dimension = num_heads or own_heads, width or plain.embed_dim
    patch = patch_size or plain.patch_embed.patch_size[0]
    # The config's own rules do not cover every model.
    if image_size % patch:
        raise ConfigError(f"patch size {patch} does not divide image size {image_size}", "change one of them")
    if dimension % heads or dimension % 4:
        raise ConfigError(f"width {dimension} is not a multiple of 4 and of {heads} heads", "change width or heads")
    overrides = {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "patch_size": patch_size,
        "class_token": class_token,
        "reg_tokens" if isinstance(plain, VisionTransformer) else "num_reg_tokens": register_tokens,
        "mlp_ratio": mlp_ratio,
        "drop_path_rate": drop_path,
    }
    keywords: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    keywords |= {"num_classes": num_classes, "global_pool": global_pool, "img_size": image_size}
    try:
        vit: TimmModel = timm.create_model(model, pretrained=False, **keywords)
    except AssertionError as error:
        raise ConfigError(f"timm cannot build {model} with these dimensions ({error})", "leave out some") from error
    if pos_embed != "learned" and vit.pos_embed is not None:
        # A buffer is saved, moved and exported like a parameter, but no optimizer or ZeRO stage sees it.
        table = vit_positions(vit, pos_embed)
        del vit.pos_embed
        vit.register_buffer("pos_embed", table)
    return vit


def pooled_norm(vit: PlainViT, wanted: bool) -> dict[str, bool]:
    """Return timm's argument of a model like `vit` that puts the final norm after the pooling, or before it."""
    return {"fc_norm" if isinstance(vit, VisionTransformer) else "use_fc_norm": wanted}


def vit_positions(vit: PlainViT, kind: str) -> Tensor:
    """Return the fixed position table `kind` that fits `vit`, in the shape of its own positions."""
    num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    return position_table(kind, grid=vit.patch_embed.grid_size[0], width=vit.embed_dim, num_prefix=num_prefix)


def num_params_m(module: nn.Module) -> float:
    """Return the number of parameters of a module, in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def require_known(model: str) -> None:
    """Raise ConfigError with the nearest names unless timm has a model of this name, and its tag if it has one."""
    if not timm.is_model(model):
        near = nearest_models(model, timm.list_models())
        raise ConfigError(f"timm has no model {model!r}", f"names near it: {', '.join(near) or 'none'}")
    try:
        timm.get_pretrained_cfg(model)
    except RuntimeError as error:
        name, _, tag = model.partition(".")
        tags = ", ".join(timm.list_pretrained(f"{name}.*"))
        raise ConfigError(f"timm has no weights {tag!r} of {name}", f"use one of {tags}, or {name}") from error


def nearest_models(model: str, names: Sequence[str]) -> list[str]:
    """Return at most three names that begin most like `model`, the usual first: vit_tny -> vit_tiny_patch16_224. If
    none does, return those that hold a word of it: dinov3_vits16 -> vit_base_patch16_dinov3.

    Only as many parts of a name are compared as `model` has, so that what it leaves out does not count.
    """
    parts = model.count("_") + 1
    starts: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: ("_patch16_224" not in name, len(name), name)):
        starts.setdefault("_".join(name.split("_")[:parts]), []).append(name)
    near = [name for start in difflib.get_close_matches(model, starts, n=3) for name in starts[start]]
    if not near:  # a name of another library, such as dinov3_vits16
        words = [word for word in re.split("[^a-z0-9]+", model.lower()) if len(word) > 3]
        near = [name for name in names if any(word in name for word in words)]
        near.sort(key=lambda name: ("_base_" not in name, len(name), name))
    return near[:3]


def is_plain(network: TimmModel) -> bool:
    """Return whether `network` is a `PlainViT` whose patches can be embedded one by one."""
    return type(network) in (VisionTransformer, Eva) and type(network.patch_embed).__name__ == "PatchEmbed"


def require_plain_vit(network: TimmModel, name: str) -> PlainViT:
    """Return `network`. Raises ConfigError unless it `is_plain`, and of colour images."""
    if not is_plain(network):
        raise ConfigError(
            f"{name} is a {type(network).__name__}, whose patches cannot be left out one by one",
            "use a plain ViT, e.g. vit_small_patch16_224 or vit_small_patch16_dinov3, or from Python a "
            "maedistill.Encoder",
        )
    require_colour(network, name)
    return network


def require_colour(network: TimmModel, name: str) -> None:
    """Raise ConfigError if a network does not take images of 3 channels."""
    if (channels := getattr(network, "in_chans", 3)) != 3:
        raise ConfigError(
            f"{name} takes images of {channels} channels", "use a network of colour images, which have 3 channels"
        )


def require_square_patches(vit: PlainViT, name: str) -> PlainViT:
    """Return `vit`. Raises ConfigError if its patches are not square, which a walk over selected patches cannot cut."""
    if len({*vit.patch_embed.patch_size}) > 1:
        size = " x ".join(map(str, vit.patch_embed.patch_size))
        raise ConfigError(f"{name} cuts patches of {size} pixels", "use a ViT with square patches")
    return vit
