"""Dimensions of timm's plain Vision Transformers by name, without importing timm.

The name determines everything: `vit_SIZE_patchP_IMAGE` plus marks such as `reg4` or `gap`. A name that is not covered
gives None, and what depends on it is checked once timm has built the model. A test compares the table with timm.
"""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

# size: (width, depth, heads)
SIZES = {
    "tiny": (192, 12, 3),
    "little": (320, 14, 5),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "mediumd": (512, 20, 8),
    "betwixt": (640, 12, 10),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
# Marks that do not change the dimensions. Others (`plus`, `18x2`, `xp`, `gap`, `rope`, ...) may change them.
_PLAIN = re.compile(
    r"^vit_(?P<size>[a-z]+)_patch(?P<patch>\d+)(?:_(?:reg\d|clip|quickgelu|siglip|dinov2|dinov3|qkvb|rpn|ls|dino|mae))*"
    r"(?:_\d{3})?(?:\.[\w.]+)?$"
)


@dataclass(frozen=True)
class Architecture:
    """Dimensions of one Vision Transformer, overrides included."""

    width: int
    depth: int
    num_heads: int
    patch_size: int


def architecture_of(model: str, overrides: Any) -> Architecture | None:
    """Return the dimensions of timm's `model`, with the overrides of a config section: width, depth, heads, patch_size.

    Returns None for a name that the table does not cover.
    """
    match = _PLAIN.match(model)
    if match is None or match["size"] not in SIZES:
        return None
    plain = Architecture(*SIZES[match["size"]], int(match["patch"]))
    return replace(plain, **{name: value for name in asdict(plain) if (value := getattr(overrides, name)) is not None})
