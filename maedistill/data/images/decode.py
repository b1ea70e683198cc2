"""Decode the bytes of one image file to RGB pixels, in the same way everywhere in the project.

    bytes -> open_image -> header -> decode -> uint8 tensor [3, H, W]                 decode_rgb: both at once
                                     to_rgb -> Pillow image
    bytes of a source -> convert -> bytes for a shard: the same if every reader supports them, else a lossless PNG

Pillow first reads and checks every header (25 us). JPEGs are then decoded by simplejpeg if it is installed, else by
torchvision; the pixels are bitwise equal to Pillow's. Pillow decodes everything else, and JPEGs that the two reject.
(torchvision's PNG decoder is a little faster, but crashes the process on some damaged files.) No other format is ever
opened. EXIF orientation and colour profiles are ignored, as is customary with ImageNet.
"""

import io
import struct
import warnings
import zlib
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.io  # noqa: F401 registers torch.ops.image
from PIL import Image
from torch import Tensor

try:
    import simplejpeg
except ImportError:  # the extra "fast" brings it
    simplejpeg = None

SHARD_FORMATS = ("JPEG", "PNG", "WEBP")
SOURCE_FORMATS = (*SHARD_FORMATS, "BMP", "GIF", "TIFF")
MOST_PIXELS = 64_000_000  # limit on the memory of a decoded image, because even a small file may hold a huge image
MOST_SCANNED = 100 * MOST_PIXELS  # pixels times scans; each scan of a progressive JPEG visits all pixels, ten are usual
BACKGROUND = (255, 255, 255)  # colour behind transparent pixels

# Use torchvision's operator, because its Python function warns on every call since 0.29 that a later release will drop
# the decoders.
_torchvision_decode: Any = getattr(torch.ops.image, "decode_jpeg", None)
_TO_RGB, _KEEP_ORIENTATION = 3, False  # torchvision's ImageReadMode.RGB and apply_exif_orientation
_decoders = {"simplejpeg": simplejpeg, "torchvision": _torchvision_decode, "pillow": Image}
JPEG_DECODERS = tuple(name for name, decoder in _decoders.items() if decoder)  # fastest first; all give the same pixels

# errors that Pillow's decoders raise on damaged files, depending on where the damage is
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
_JPEG = ("JPEG", "MPO")  # MPO: a JPEG followed by a second one, e.g. a preview
_START_OF_SCAN, _SMALLEST_SCAN = b"\xff\xda", 10  # bytes of a scan: its marker and the header of one component
_GRAY_MODES = ("1", "L", "LA", "I;16", "I;16B")
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")

warnings.filterwarnings("ignore", module=r"PIL\.")  # files are checked here; a warning each would flood the log


class BadImage(ValueError):
    """An image that cannot be decoded, with a message that says why."""


def decode_rgb(data: bytes, *, decoder: str = JPEG_DECODERS[0]) -> Tensor:
    """Decode a JPEG, PNG or WebP file, of animations the first frame: uint8 [3, H, W], channels last in memory.

    decoder: for JPEGs, one of `JPEG_DECODERS`. Raise `BadImage` for other formats and damaged files, and, before
    decoding, for more than 64 million pixels.
    """
    with open_image(data) as image:
        return decode(image, data, decoder=decoder)


def open_image(data: bytes, *, formats: tuple[str, ...] = SHARD_FORMATS) -> Image.Image:
    """Read the header only. Raise `BadImage` if the file has none of Pillow's `formats`, or is too large to decode."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except _DECODE_ERRORS as error:
        reason = "no " + ", ".join(formats) + " file" if isinstance(error, Image.UnidentifiedImageError) else error
        raise BadImage(str(reason)) from error
    pixels = image.width * image.height
    if pixels > MOST_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
    if image.format in _JPEG and pixels * len(data) > MOST_SCANNED * _SMALLEST_SCAN:  # else too short for so many scans
        scans = data.count(_START_OF_SCAN)
        if pixels * scans > MOST_SCANNED:
            raise BadImage(f"{scans:,} scans of {image.width} x {image.height} pixels, which would take too long")
    return image


def decode(image: Image.Image, data: bytes, *, decoder: str = JPEG_DECODERS[0]) -> Tensor:
    """Decode the pixels of an opened image: uint8 [3, H, W], channels last in memory.

    data: the bytes that it was opened from. decoder: for JPEGs, one of `JPEG_DECODERS`. Raise `BadImage` if the file is
    damaged.
    """
    if image.format in _JPEG and image.mode in ("RGB", "L"):
        pixels = None
        with suppress(RuntimeError, ValueError):  # Pillow may succeed then, or explain why it does not
            if decoder == "simplejpeg":
                pixels = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
            elif decoder == "torchvision":
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # [bytes]; torch wants writable memory
                pixels = _torchvision_decode(encoded, _TO_RGB, _KEEP_ORIENTATION)
        if pixels is not None and pixels.shape == (3, image.height, image.width):  # agrees with Pillow's header
            return pixels
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)  # [3, H, W]


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the first frame of an opened image in 8-bit RGB.

    16-bit gray is scaled by 1/257 and rounded, 16-bit colour keeps its high byte (Pillow reads no more), transparent
    images are composited over `BACKGROUND`. Raise `BadImage` if the file is damaged, or has 32-bit pixels, whose white
    is not defined.
    """
    try:
        image.load()
        if image.mode in _SIXTEEN_BIT_MODES:
            image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise BadImage("32-bit pixels, whose range is not defined")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
        return image.convert("RGB")
    except _DECODE_ERRORS as error:
        raise BadImage(str(error) or type(error).__name__) from error


class Converted(NamedTuple):
    """An image as it is stored in a shard."""

    data: bytes
    suffix: str  # jpg, png or webp
    change: str | None  # why the bytes differ from the source's: "CMYK", "animated", "shrunk", ...; None if they do not
    is_grayscale: bool  # whether the source image is


def convert(data: bytes, *, shorter_side: int | None = None, quality: int = 90) -> Converted:
    """Convert one source file for a shard and check that the result decodes. Raise `BadImage` if nothing decodes it.

    Lossy re-encoding is opt-in: images whose shorter side is longer than `shorter_side` are downscaled to it and
    written as JPEG. Smaller images keep their bytes, because a second lossy pass would only cost quality.
    """
    with open_image(data, formats=SOURCE_FORMATS) as image:
        is_grayscale, reason = image.mode in _GRAY_MODES, _nonstandard_reason(image, data)
        if shorter_side is not None and min(image.size) > shorter_side:
            scale = shorter_side / min(image.size)
            width, height = (max(shorter_side, round(side * scale)) for side in image.size)
            buffer = io.BytesIO()
            to_rgb(image).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
            return Converted(buffer.getvalue(), "jpg", "shrunk", is_grayscale)
        if reason is not None:
            return Converted(encode_png(to_rgb(image)), "png", reason, is_grayscale)
        decode_rgb(data)
        return Converted(data, "jpg" if image.format in _JPEG else str(image.format).lower(), None, is_grayscale)


def encode_png(image: Image.Image) -> bytes:
    """Return a lossless PNG. At 32 pixels a shard is 12 % larger than with WebP, reads as fast, writes 7 x faster."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _nonstandard_reason(image: Image.Image, data: bytes) -> str | None:
    """Return why other tools may fail on this file; None for a plain 8-bit RGB or grayscale JPEG, PNG or WebP."""
    is_jpeg = image.format in _JPEG
    if not is_jpeg and image.format not in SHARD_FORMATS:
        return str(image.format)
    if not is_jpeg and getattr(image, "is_animated", False):
        return "animated"
    if image.has_transparency_data:
        return "transparent"
    if image.mode == "P":
        return "palette"
    depth = data[24] if image.format == "PNG" else 8  # bits per channel; byte 24 of a PNG, in its first chunk
    if depth != 8:
        return f"{depth}-bit"
    return None if image.mode in ("RGB", "L") else image.mode
