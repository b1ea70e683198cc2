"""Bring 16-bit pixels to 8 bits by the depth that they use: cameras and microscopes store 10, 12 or 14 bits in 16.

    opened image -> wide_pixels -> uint16 [H, W] or [H, W, 3], None for 8-bit images -> used_bits, to_eight_bits
                 -> high_bytes -> uint8 [H, W, 3], of colour of 16 bits per channel alone

A 12-bit picture that is divided by 257 keeps 16 of its 4,096 levels and is black. The depth is the smallest usual one
that holds the largest value.
"""

import io
import sys

import numpy as np
from PIL import Image

DEPTHS = (8, 10, 12, 14, 16)
UNKNOWN = -1
WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
DARK = 1 << DEPTHS[-2] - 8  # high bytes from here on need 16 bits
_TIFF, _BITS_PER_SAMPLE = (b"II*\0", b"MM\0*"), 258
_N = "L" if sys.byteorder == "little" else "B"
# Pillow's unpackers of 16-bit colour take the high byte of each sample; those that take the low one.
_LOW_BYTES = {
    f"{mode};16{order}": f"{mode};16{'L' if (_N if order == 'N' else order) == 'B' else 'B'}"
    for mode in ("RGB", "RGBA", "RGBX")
    for order in "BLN"
}
_LOW_BYTES["LA;16B"] = "RGBA"  # there is none: the four bytes of a pixel become its channels


def wide_pixels(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Return the pixels of a loaded image that has 16 bits per channel: uint16 [H, W] or [H, W, 3]; None if it has 8.

    Of 16-bit colour Pillow reads the high bytes only. Those are enough unless they are small, so the low ones are read
    only then, from `data`, where Pillow has an unpacker that does. Alpha is left out.
    """
    if image.mode in WIDE_MODES or (image.mode == "I" and image.format == "PPM"):
        return np.asarray(image).astype(np.uint16)
    if (high := high_bytes(image, data)) is None or high.max() >= DARK:
        return None
    with Image.open(io.BytesIO(data), formats=("PNG", "TIFF")) as again:
        arguments = [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in again.tile]
        if not {first for first, *_ in arguments} <= _LOW_BYTES.keys():
            return None
        by_pairs = any(first == "LA;16B" for first, *_ in arguments)
        again.tile = [
            tile._replace(args=(_LOW_BYTES[first], *rest) if rest else _LOW_BYTES[first])
            for tile, (first, *rest) in zip(again.tile, arguments, strict=True)
        ]
        low = np.asarray(again)  # [H, W, 3], with alpha 4
        return high.astype(np.uint16) << 8 | (low[..., 1:2] if by_pairs else low[..., :3])


def high_bytes(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Return the high bytes of a loaded image that has 16 bits per channel of red, green and blue; None for others."""
    if image.mode in ("RGB", "RGBA") and (
        is_wide_png(data) or (data[:4] in _TIFF and 16 in getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, ()))
    ):
        return np.asarray(image)[..., :3]
    return None


def is_wide_png(data: bytes) -> bool:
    """Return whether a PNG has 16 bits per channel, by its first chunk."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10"


def bits_of(image: Image.Image, data: bytes) -> int:
    """Return the depth that a loaded image uses: one of `DEPTHS`, 0 for 8-bit images, UNKNOWN if it cannot be read."""
    if (wide := wide_pixels(image, data)) is not None:
        return used_bits(wide)
    if (high := high_bytes(image, data)) is None:
        return 0
    return DEPTHS[-1] if high.max() >= DARK else UNKNOWN


def used_bits(pixels: np.ndarray) -> int:
    """Return the depth that holds the largest of these values: one of `DEPTHS`."""
    needed = int(pixels.max(initial=0)).bit_length()
    return next(depth for depth in DEPTHS if depth >= needed)


def to_eight_bits(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Scale values of this many bits to uint8, white to white, rounded."""
    white = (1 << bits) - 1
    return ((pixels.astype(np.uint32) * 255 + white // 2) // white).clip(0, 255).astype(np.uint8)
