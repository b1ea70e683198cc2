"""What goes into a shard for one source file: its own bytes where every reader understands them, else a lossless PNG.

    bytes -> convert -> Converted(bytes, suffix, what was done), or BadImage

Re-encoding is the exception that a person asks for: with `shorter_side`, images whose shorter side is longer are
shrunk to it and written as JPEG; smaller ones keep their bytes, for a second lossy pass would only cost quality.
"""

import io
from typing import NamedTuple

from PIL import Image

from maedistill.data.images.decode import SHARD_FORMATS, decode_rgb, nonstandard_reason, open_image, to_rgb

SOURCE_FORMATS = (*SHARD_FORMATS, "BMP", "GIF", "TIFF")
_GRAY_MODES = ("1", "L", "LA", "I;16", "I;16B")
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class Converted(NamedTuple):
    """One image as a shard holds it."""

    data: bytes
    suffix: str  # jpg, png or webp
    change: str | None  # why the bytes are not the source's: "CMYK", "animated", "shrunk", ...; None where they are
    is_grayscale: bool  # in the source


def convert(data: bytes, *, shorter_side: int | None = None, quality: int = 90) -> Converted:
    """Decides for one file and proves that the result decodes. Raises `BadImage` for what no decoder takes."""
    with open_image(data, formats=SOURCE_FORMATS) as image:
        is_grayscale, odd = image.mode in _GRAY_MODES, nonstandard_reason(image, data)
        if shorter_side is not None and min(image.size) > shorter_side:
            return Converted(_shrunk(to_rgb(image), shorter_side, quality), "jpg", "shrunk", is_grayscale)
        if odd is not None:
            return Converted(encode_png(to_rgb(image)), "png", odd, is_grayscale)
        decode_rgb(data)
        return Converted(data, _SUFFIXES[str(image.format)], None, is_grayscale)


def encode_png(image: Image.Image) -> bytes:
    """Lossless; at 32 pixels 12 % larger in a shard than WebP, as fast to read and seven times faster to write."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _shrunk(image: Image.Image, shorter_side: int, quality: int) -> bytes:
    scale = shorter_side / min(image.size)
    size = (max(shorter_side, round(image.width * scale)), max(shorter_side, round(image.height * scale)))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
