"""Turn photographs upright: cameras store them as the sensor sees them, and say in EXIF how they were held.

opened image -> orientation -> 1 (as stored) .. 8 -> upright(pixels) -> pixels

"""

from contextlib import suppress

import torch
from PIL import Image
from torch import Tensor

TAG = 0x0112
AS_STORED = 1


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image, from 1 to 8; 1 if it states none that is defined."""
    with suppress(Exception):  # Pillow parses EXIF leniently, but not without errors; what it cannot read says nothing
        value = image.getexif().get(TAG, AS_STORED)
        if isinstance(value, int) and 1 <= value <= 8:
            return value
    return AS_STORED


def upright(pixels: Tensor, turned: int) -> Tensor:
    """Undo an EXIF orientation: [3, H, W] -> [3, H, W], from 5 on [3, W, H]."""
    if turned >= 5:
        pixels = pixels.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(turned, ())
    return torch.flip(pixels, flips) if flips else pixels


def exif_of(turned: int) -> bytes:
    """Return an EXIF block that states an orientation and nothing else; empty for images as stored."""
    if turned == AS_STORED:
        return b""
    exif = Image.Exif()
    exif[TAG] = turned
    return exif.tobytes()
