"""Decode the bytes of one image file to RGB pixels, in the same way everywhere in the project.

    bytes -> open_image -> header -> decode -> uint8 tensor [3, H, W]                 decode_rgb: both at once
                                     to_rgb -> Pillow image

Pillow first reads and checks every header (25 us). JPEGs are then decoded by simplejpeg if it is installed, else by
torchvision; the pixels are bitwise equal to Pillow's. Pillow decodes everything else, and JPEGs that the two reject.
(torchvision's PNG decoder is a little faster, but crashes the process on some damaged files.) No other format is ever
opened. EXIF orientation is ignored unless it is asked for, and colour profiles always, as is customary with ImageNet.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import numpy as np
import torch
import torchvision.io  # noqa: F401 registers torch.ops.image
from PIL import Image
from torch import Tensor

from maedistill.data.images.depth import to_eight_bits, used_bits, wide_pixels
from maedistill.data.images.orientation import AS_STORED, orientation, upright
from maedistill.errors import UserError

try:
    import simplejpeg
except ImportError:  # the extra "fast" brings it
    simplejpeg = None

SHARD_FORMATS = ("JPEG", "PNG", "WEBP")
SOURCE_FORMATS = (*SHARD_FORMATS, "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
MOST_PIXELS = 64_000_000  # limit on the memory of a decoded image, because even a small file may hold a huge image
MOST_SCANNED = 100 * MOST_PIXELS  # pixels times scans; each scan of a progressive JPEG visits all pixels, ten are usual
_MOST_READS = 500_000  # pieces that Pillow reads a file in; usual are tens, and each takes a microsecond
BACKGROUND = (255, 255, 255)  # colour behind transparent pixels

# Use torchvision's operator, because its Python function warns on every call since 0.29 that a later release will drop
# the decoders.
_torchvision_decode: Any = getattr(torch.ops.image, "decode_jpeg", None)
_TO_RGB, _KEEP_ORIENTATION = 3, False  # torchvision's ImageReadMode.RGB and apply_exif_orientation
_decoders = {"simplejpeg": simplejpeg, "torchvision": _torchvision_decode, "pillow": Image}
JPEG_DECODERS = tuple(name for name, decoder in _decoders.items() if decoder)  # fastest first; all give the same pixels

JPEG_FORMATS = ("JPEG", "MPO")  # MPO: a JPEG followed by a second one, e.g. a preview
_START_OF_SCAN, _SMALLEST_SCAN = b"\xff\xda", 10  # bytes of a scan: its marker and the header of one component

warnings.filterwarnings("ignore", module=r"PIL\.")  # files are checked here; a warning each would flood the log


class BadImage(ValueError):
    """An image that cannot be decoded, with a message that says why."""


@contextmanager
def damage_as_bad_image() -> Iterator[None]:
    """Turn any exception into `BadImage`: which one Pillow raises on a damaged file depends on where the damage is."""
    try:
        yield
    except (BadImage, UserError, MemoryError):
        raise
    except Exception as error:
        raise BadImage(str(error) or type(error).__name__) from error


class _Pieces(io.BytesIO):
    """A file in memory that fails if it is read in too many pieces.

    Pillow walks through headers in Python, of some formats byte by byte: a file of empty chunks or of padding, 20 MB of
    it, would take ten seconds and more.
    """

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes. Raise OSError after too many calls."""
        self.reads += 1
        if self.reads > _MOST_READS:
            raise OSError(f"more than {_MOST_READS:,} pieces of padding or empty chunks")
        return super().read(size)


def decode_rgb(data: bytes, *, decoder: str = JPEG_DECODERS[0], apply_exif: bool = False) -> Tensor:
    """Decode a JPEG, PNG or WebP file, of animations the first frame: uint8 [3, H, W], channels last in memory.

    decoder: for JPEGs, one of `JPEG_DECODERS`. apply_exif: turn the image upright. Raise `BadImage` for other
    formats and damaged files, and, before decoding, for more than 64 million pixels.
    """
    with open_image(data) as image:
        pixels = decode(image, data, decoder=decoder)
        if not apply_exif or (turned := orientation(image)) == AS_STORED:
            return pixels
        return upright(pixels, turned).permute(1, 2, 0).contiguous().permute(2, 0, 1)  # [3, H, W], channels last


def is_image(file: BinaryIO) -> bool:
    """Return whether a file has the header of one of `SOURCE_FORMATS`. It is not decoded."""
    try:
        with damage_as_bad_image():
            Image.open(file, formats=SOURCE_FORMATS)
    except BadImage:
        return False
    return True


def open_image(data: bytes, *, formats: tuple[str, ...] = SHARD_FORMATS) -> Image.Image:
    """Read the header only. Raise `BadImage` if the file has none of Pillow's `formats`, or is too large to decode."""
    with damage_as_bad_image():
        try:
            image = Image.open(_Pieces(data), formats=formats)
        except Image.UnidentifiedImageError as error:
            raise BadImage(f"no {', '.join(formats)} file") from error
    pixels = image.width * image.height
    if pixels > MOST_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
    if (
        image.format in JPEG_FORMATS and pixels * len(data) > MOST_SCANNED * _SMALLEST_SCAN
    ):  # else too short for so many scans
        scans = data.count(_START_OF_SCAN)
        if pixels * scans > MOST_SCANNED:
            raise BadImage(f"{scans:,} scans of {image.width} x {image.height} pixels, which would take too long")
    return image


def decode(image: Image.Image, data: bytes, *, decoder: str = JPEG_DECODERS[0]) -> Tensor:
    """Decode the pixels of an opened image: uint8 [3, H, W], channels last in memory.

    data: the bytes that it was opened from. decoder: for JPEGs, one of `JPEG_DECODERS`. Raise `BadImage` if the file is
    damaged.
    """
    if image.format in JPEG_FORMATS and image.mode in ("RGB", "L"):
        pixels = None
        with suppress(RuntimeError, ValueError):  # Pillow may succeed then, or explain why it does not
            if decoder == "simplejpeg":
                pixels = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
            elif decoder == "torchvision":
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # [bytes]; torch wants writable memory
                pixels = _torchvision_decode(encoded, _TO_RGB, _KEEP_ORIENTATION)
        if pixels is not None and pixels.shape == (3, image.height, image.width):  # agrees with Pillow's header
            return pixels
    return torch.from_numpy(np.array(to_rgb(image, data))).permute(2, 0, 1)  # [3, H, W]


def to_rgb(image: Image.Image, data: bytes, *, bits: int | None = None) -> Image.Image:
    """Return the first frame of an image that was opened from `data`, in 8-bit RGB.

    16-bit images are scaled by the depth of their set (`bits`), by default by the one that they use themselves.
    Transparent images are composited over `BACKGROUND`. Raise `BadImage` if the file is damaged, or has
    32-bit pixels, whose white is not defined.
    """
    with damage_as_bad_image():
        image.load()
        if (wide := wide_pixels(image, data)) is not None:
            colours = Image.fromarray(to_eight_bits(wide, used_bits(wide) if bits is None else bits))
            if image.mode == "RGBA":
                colours.putalpha(image.getchannel("A"))
            image = colours
        elif image.mode in ("I", "F"):
            raise BadImage("32-bit pixels, whose range is not defined")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
        return image.convert("RGB")
