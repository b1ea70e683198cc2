"""Infer the architecture of a plain ViT from the names and shapes of its weights, which are untrusted input.

patch_embed.proj.weight [768, 3, 16, 16], blocks 0 to 11, cls_token, pos_embed [1, 197, 768] -> ViT-B/16 at 224 px

The number of heads is in no shape: it is that of timm's model of this width and depth, or width / 64.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from maedistill.config.architectures import SIZES
from maedistill.errors import ConfigError

KEY_OF_MODEL = {"teacher": "teacher.model", "init": "student.model"}  # by the config section of the source
OTHER_KINDS = "a file holds a plain ViT; name another kind of network as timm:NAME or local-dir:FOLDER"
_ONE_FOR_ALL = "small"  # the timm size whose name stands for networks that timm has no size for
_HEAD_WIDTH = 64
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)")
_OUTSIDE = {"patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "reg_token", "pos_embed"}
_OUTSIDE |= {"norm.weight", "norm.bias"}


@dataclass(frozen=True)
class Recognized:
    """What the shapes say. model: the timm model that is built, with these dimensions in place of its own."""

    model: str
    width: int
    depth: int
    num_heads: int
    patch_size: int
    register_tokens: int
    mlp_ratio: float
    class_token: bool
    heads_known: bool

    def describe(self) -> str:
        """Describe the network, and what is assumed about it."""
        registers = f", {self.register_tokens} registers" if self.register_tokens else ""
        token = "class token" if self.class_token else "no class token"
        mlp = "" if self.mlp_ratio == 4 else f", MLP x {self.mlp_ratio:g}"
        return (
            f"read off its shapes: {self.width} x {self.depth}, patch {self.patch_size}, {token}{registers}{mlp}; "
            f"{self.num_heads} heads{'' if self.heads_known else ' assumed'}"
        )


def recognize(
    weights: Mapping[str, Tensor],
    foreign: Sequence[str],
    *,
    name: str,
    section: str | None,
    num_heads: int | None = None,
) -> Recognized:
    """Return the architecture of an encoder's weights, by timm's names. foreign: other keys of the file.

    num_heads: if they are known. Raises ConfigError, with the key to set, if the weights are not those of a plain ViT
    or leave more open than its heads.
    """

    def refuse(reason: str, *, heads: bool = False) -> ConfigError:
        key = KEY_OF_MODEL.get(section or "")
        remedy = f"set {key} to the timm ViT that it is, e.g. {key}={likely_model(weights)}" if key else None
        if section == "teacher":
            remedy = f"{remedy}; {OTHER_KINDS}" if kernel is not None and blocks else OTHER_KINDS
        if key and heads:
            remedy = f"set {key.replace('model', 'num_heads')}"
        cause = f"{name}: its architecture cannot be told from its shapes: {reason}"
        return ConfigError(cause, remedy or "name a run, an export, or a model of timm or the hub")

    blocks = {int(match[1]) for key in weights if (match := _BLOCK.fullmatch(key))}
    kernel, hidden = weights.get("patch_embed.proj.weight"), weights.get("blocks.0.mlp.fc1.weight")
    others = [*foreign, *(key for key in weights if key not in _OUTSIDE and not _BLOCK.fullmatch(key))]
    if others:
        shown = others[0][:80] if others[0].isprintable() else ascii(others[0])[:80]
        raise refuse(f"a plain ViT has no {shown} ({len(others)} such keys)")
    if kernel is None or hidden is None or blocks != set(range(len(blocks))):
        raise refuse("patches or blocks are missing")
    if kernel.ndim != 4 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3] or hidden.ndim != 2:
        raise refuse("it does not cut colour images into square patches")
    width, depth, patch_size = kernel.shape[0], len(blocks), kernel.shape[2]
    size = next((size for size, shape in SIZES.items() if shape[:2] == (width, depth)), None)
    if num_heads is None and size is None and width % _HEAD_WIDTH:
        raise refuse(f"a width of {width} is not a multiple of {_HEAD_WIDTH}, so its heads are unknown", heads=True)
    if not width or (4 * hidden.shape[0]) % width:
        raise refuse("its blocks have other widths than its patches")
    class_token, registers = prefix_tokens(weights)
    if "pos_embed" in weights and grid_of(weights) is None:
        raise refuse(f"its positions {tuple(weights['pos_embed'].shape)} do not count patches and all tokens")
    return Recognized(
        model=f"vit_{size or _ONE_FOR_ALL}_patch16_224",
        width=width,
        depth=depth,
        num_heads=num_heads or (SIZES[size][2] if size else width // _HEAD_WIDTH),
        heads_known=num_heads is not None,
        patch_size=patch_size,
        register_tokens=registers,
        mlp_ratio=hidden.shape[0] / width,
        class_token=class_token,
    )


def likely_model(weights: Mapping[str, Tensor]) -> str:
    """Return a model of timm with the parts of these weights, of their width if timm has one: an example to correct."""
    bias = weights.get("patch_embed.proj.bias")
    size = next((size for size in ("small", "large") if bias is not None and bias.shape == SIZES[size][:1]), "base")
    if "blocks.0.gamma_1" in weights:
        return f"vit_{size}_patch16_dinov3"
    if "blocks.0.mlp.fc1_g.weight" in weights:
        return f"eva02_{size}_patch14_224"
    if "blocks.0.ls1.gamma" not in weights and "reg_token" not in weights:
        return f"vit_{size}_patch16_224"
    return f"vit_{size}_patch14_{'reg4_' if 'reg_token' in weights else ''}dinov2"


def prefix_tokens(weights: Mapping[str, Tensor]) -> tuple[bool, int]:
    """Return whether there is a class token, and the number of registers."""
    registers = weights.get("reg_token")
    if registers is None or registers.ndim != 3 or not registers.numel():  # an empty one may state any number
        return "cls_token" in weights, 0
    return "cls_token" in weights, registers.shape[1]


def grid_of(weights: Mapping[str, Tensor]) -> int | None:
    """Return the side of the square patch grid that the stored positions are for; None if they are for none."""
    positions = weights.get("pos_embed")
    if positions is None or positions.ndim != 3 or (patches := positions.shape[1] - sum(prefix_tokens(weights))) < 1:
        return None
    side = math.isqrt(patches)
    return side if side**2 == patches else None
