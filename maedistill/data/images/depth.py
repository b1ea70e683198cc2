"""Bring 16-bit pixels to 8 bits by the depth that they use: cameras and microscopes store 10, 12 or 14 bits in 16.

    opened image -> wide_pixels -> uint16 [H, W] or [H, W, 3], None for 8-bit images -> used_bits, to_eight_bits

A 12-bit picture that is divided by 257 keeps 16 of its 4,096 levels and is black. The depth is the smallest usual one
that holds the largest value.
"""

import io

import numpy as np
from PIL import Image

DEPTHS = (8, 10, 12, 14, 16)
WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_HIGH_BYTES, _LOW_BYTES = "RGB;16B", "RGB;16L"  # of the big-endian samples of a PNG: Pillow's unpackers take one byte


def wide_pixels(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Return the pixels of a loaded image that has 16 bits per channel: uint16 [H, W] or [H, W, 3]; None if it has 8.

    Of 16-bit colour Pillow reads the high bytes only. Those are enough unless they are small, so the low ones are read
    only then, from `data`; of colour formats other than plain PNG, never.
    """
    if image.mode in WIDE_MODES or (image.mode == "I" and image.format == "PPM"):
        return np.asarray(image).astype(np.uint16)
    if not is_wide_png(data) or image.mode != "RGB":
        return None
    high = np.asarray(image).astype(np.uint16)  # [H, W, 3]
    if int(high.max()) << 8 >= 1 << DEPTHS[-2]:
        return None
    with Image.open(io.BytesIO(data), formats=("PNG",)) as again:
        if [tile.args for tile in again.tile] != [_HIGH_BYTES]:
            return None
        again.tile = [tile._replace(args=_LOW_BYTES) for tile in again.tile]
        return high << 8 | np.asarray(again)


def is_wide_png(data: bytes) -> bool:
    """Return whether a PNG has 16 bits per channel, by its first chunk."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10"


def used_bits(pixels: np.ndarray) -> int:
    """Return the depth that holds the largest of these values: one of `DEPTHS`."""
    needed = int(pixels.max(initial=0)).bit_length()
    return next(depth for depth in DEPTHS if depth >= needed)


def to_eight_bits(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Scale values of so many bits to uint8, white to white, rounded."""
    white = (1 << bits) - 1
    return ((pixels.astype(np.uint32) * 255 + white // 2) // white).clip(0, 255).astype(np.uint8)
