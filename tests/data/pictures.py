"""Pictures as files: what Pillow writes, and what it does not."""

import io
import struct
import zlib

import numpy as np


def encode(image, kind, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(chunks) -> bytes:
    """A PNG of these chunks, (name, content), each with the right length and checksum."""
    whole = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def png(pixels, *, colour, depth):
    """A PNG written by hand, since Pillow writes no 16-bit colour: pixels [H, W, channels], PNG colour type."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2" if depth == 16 else np.uint8))
    return png_of([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def tiff(pixels, *, order, compressed=False, alpha=2):
    """A TIFF written by hand, of 16 bits per channel: pixels [H, W, 3], or 4 with alpha; byte order II or MM.

    alpha: 1 if the colours are multiplied by it.
    """
    (height, width, channels), end = pixels.shape, "<" if order == "II" else ">"
    strip, start = pixels.astype(f"{end}u2").tobytes(), 8 + 2 + 12 * (6 + channels) + 4
    strip = zlib.compress(strip) if compressed else strip
    tags = {256: width, 257: height, 258: start, 259: 8 if compressed else 1, 262: 2, 273: start + 8, 277: channels}
    tags |= {278: height, 279: len(strip)}
    tags |= {338: alpha} if channels == 4 else {}
    rows = b"".join(struct.pack(f"{end}HHII", tag, 4, 1, value) for tag, value in tags.items() if tag != 258)
    depth = struct.pack(f"{end}HHII", 258, 3, channels, start)
    rows = rows[:24] + depth + rows[24:]
    header = order.encode() + struct.pack(f"{end}HIH", 42, 8, len(tags))
    return header + rows + bytes(4) + struct.pack(f"{end}4H", 16, 16, 16, 16) + strip
