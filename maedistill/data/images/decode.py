"""From the bytes of one image file to RGB pixels, the same wherever the project looks at an image.

    bytes -> open_image -> header -> decode -> uint8 tensor [3, H, W]                 decode_rgb: both at once
                                     to_rgb -> Pillow image

Pillow reads every header first (25 us) and judges it. JPEGs then take simplejpeg where it is installed, or else
torchvision's decoder; the pixels are Pillow's, bit for bit. Pillow decodes everything else, and what those two refuse:
it has the last word. (torchvision's PNG decoder is a little faster, but crashes the process on some damaged files.) No
other format is ever opened. EXIF orientation and colour profiles are ignored, as ImageNet's users always have.
"""

import io
import struct
import warnings
import zlib

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
MOST_PIXELS = 64_000_000  # an image may not cost more memory than this when decoded, however small its file is
MOST_SCANNED = 100 * MOST_PIXELS  # each scan of a progressive JPEG is one more walk over all pixels: usual are ten
BACKGROUND = (255, 255, 255)  # what shows through transparent pixels

# torchvision's operator rather than its Python function, which since 0.29 warns at every call that a later release will
# drop the decoders
_torchvision_decode = getattr(torch.ops.image, "decode_jpeg", None)
_TO_RGB, _KEEP_ORIENTATION = 3, False  # torchvision's ImageReadMode.RGB and apply_exif_orientation
_found = {"simplejpeg": simplejpeg, "torchvision": _torchvision_decode, "pillow": Image}
JPEG_DECODERS = tuple(name for name, found in _found.items() if found)  # of the same pixels, the fastest first

# what Pillow's decoders raise on damaged bytes, depending on where the damage is
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
_JPEG = ("JPEG", "MPO")  # MPO: a JPEG with a second one, e.g. a preview, behind it
_START_OF_SCAN, _SMALLEST_SCAN = b"\xff\xda", 10  # bytes: the marker and the header of one component
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")

warnings.filterwarnings("ignore", module=r"PIL\.")  # what Pillow finds odd is judged here, and not worth a line each


class BadImage(ValueError):
    """An image that cannot be decoded; the text says why."""


def decode_rgb(data: bytes) -> Tensor:
    """Pixels of a JPEG, PNG or WebP file as uint8 [3, H, W], channels last in memory; of animations the first frame.

    Raises `BadImage` for anything else, for damaged files, and for more than 64 million pixels before decoding them.
    """
    with open_image(data) as image:
        return decode(image, data)


def open_image(data: bytes, *, formats: tuple[str, ...] = SHARD_FORMATS) -> Image.Image:
    """Reads the header only. Raises `BadImage` if it is none of Pillow's `formats`, or too large to decode."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except _DECODE_ERRORS as error:
        reason = "no " + ", ".join(formats) + " file" if isinstance(error, Image.UnidentifiedImageError) else error
        raise BadImage(str(reason)) from error
    pixels = image.width * image.height
    if pixels > MOST_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
    if image.format in _JPEG and pixels * len(data) > MOST_SCANNED * _SMALLEST_SCAN:  # else they are not worth counting
        scans = data.count(_START_OF_SCAN)
        if pixels * scans > MOST_SCANNED:
            raise BadImage(f"{scans:,} scans of {image.width} x {image.height} pixels, which would take too long")
    return image


def decode(image: Image.Image, data: bytes, *, decoder: str = JPEG_DECODERS[0]) -> Tensor:
    """Decode the pixels of an opened image: uint8 [3, H, W], channels last in memory.

    data: the bytes that it was opened from. decoder: of JPEGs, one of `JPEG_DECODERS`. Raises `BadImage` if the file is
    damaged.
    """
    if image.format in _JPEG and image.mode in ("RGB", "L"):
        pixels = _decode_jpeg(data, decoder=decoder)
        if pixels is not None and pixels.shape == (3, image.height, image.width):  # the header as Pillow understood it
            return pixels
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)  # [3, H, W]


def _decode_jpeg(data: bytes, *, decoder: str) -> Tensor | None:
    """uint8 [3, H, W]; None where Pillow has to decode, or has the last word and the better message."""
    try:
        if decoder == "simplejpeg":
            return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
        if decoder == "torchvision":
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # [bytes]; torch wants writable memory
            return _torchvision_decode(encoded, _TO_RGB, _KEEP_ORIENTATION)
    except (RuntimeError, ValueError):
        pass
    return None


def nonstandard_reason(image: Image.Image, data: bytes) -> str | None:
    """Why other tools may stumble on this file; None for a plain 8-bit RGB or grayscale JPEG, PNG or WebP."""
    is_jpeg = image.format in _JPEG
    if not is_jpeg and image.format not in SHARD_FORMATS:
        return str(image.format)
    if not is_jpeg and getattr(image, "is_animated", False):
        return "animated"
    if image.has_transparency_data:
        return "transparent"
    if image.mode == "P":
        return "palette"
    depth = data[24] if image.format == "PNG" else 8  # bits per channel, which a PNG's first chunk states there
    if depth != 8:
        return f"{depth}-bit"
    return None if image.mode in ("RGB", "L") else image.mode


def to_rgb(image: Image.Image) -> Image.Image:
    """The first frame of an opened image in 8-bit RGB.

    16-bit gray is scaled by 1/257 and rounded, 16-bit colour keeps its high byte (Pillow reads no more), transparency
    is laid over `BACKGROUND`. Raises `BadImage` if the file is damaged or its numbers have no defined white.
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
    except BadImage:
        raise
    except _DECODE_ERRORS as error:
        raise BadImage(str(error) or type(error).__name__) from error
