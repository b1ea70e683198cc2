"""Image bytes: damaged JPEG, PNG and WebP files of every kind, with checksums mended and sizes that lie.

An image that is taken has the size its header states; the converter's plain files decode to the same.
"""

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from maedistill.data.images.convert import convert
from maedistill.data.images.decode import BadImage, decode_rgb, open_image
from tests.data import pictures
from tests.faults.fuzz.damage import NASTY, byte_edits, cases, edited

REFUSALS = (BadImage,)
MARKERS = (b"\xff\xd8", b"\xff\xd9", b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xdd\0\4\0\1",
           b"\xff\xd0", b"IHDR", b"IDAT", b"IEND", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"ANMF", b"VP8X", b"VP8L",
           b"ALPH")  # fmt: skip


def check(case: tuple[bytes, bool]) -> None:
    """Decode as the loader does or, where the flag is set, convert as make_shards does."""
    data, converts = case
    if converts:
        converted = convert(data)
        assert decode_rgb(converted.data).shape[0] == 3 and (converted.change is None) == (converted.data is data)
        return
    pixels = decode_rgb(data)
    with open_image(data) as image:
        assert tuple(pixels.shape) == (3, image.height, image.width) and image.width * image.height <= 64_000_000
    assert str(pixels.dtype) == "torch.uint8" and pixels.max() >= pixels.min()  # every byte is there


def encode(kind: str, mode: str = "RGB", size: tuple[int, int] = (37, 23), **options: Any) -> bytes:
    """A smooth picture with some noise."""
    draws = np.random.default_rng(0)
    small = Image.fromarray(draws.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    else:
        image = small.convert(mode)
    if options.pop("frames", 1) > 1:
        options |= {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
    if options.pop("exif", False):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    return pictures.encode(image, kind, **options)


SEEDS = {
    "jpeg": encode("JPEG"),
    "progressive": encode("JPEG", progressive=True, subsampling=0, exif=True),
    "restarts": encode("JPEG", restart_marker_blocks=1, subsampling=2),
    "gray": encode("JPEG", "L"),
    "cmyk": encode("JPEG", "CMYK"),
    "mpo": encode("MPO", frames=2),
    "png": encode("PNG"),
    "rgba": encode("PNG", "RGBA"),
    "palette": encode("PNG", "P", transparency=3),
    "one bit": encode("PNG", "1"),
    "16 bit": encode("PNG", "I;16"),
    "gray alpha": encode("PNG", "LA"),
    "apng": encode("PNG", frames=2),
    "webp": encode("WEBP"),
    "lossless": encode("WEBP", "RGBA", lossless=True),
    "animated": encode("WEBP", frames=2),
    "gif": encode("GIF", "P", frames=2),
    "bmp": encode("BMP"),
    "tiff": encode("TIFF", compression="tiff_lzw"),
}
PNGS = [name for name, data in SEEDS.items() if data.startswith(b"\x89PNG")]
SIZES = st.sampled_from([0, 1, 2, 255, 4096, 7999, 8000, 16383, 16384, 65535, 2**31 - 1, 2**32 - 1])


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(name, content) of each chunk of a PNG."""
    found, at = [], 8
    while at < len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += size + 12
    return found


def resized(name: str, width: int, height: int) -> bytes:
    """A seed whose header states another size."""
    data = bytearray(SEEDS[name])
    if name in PNGS:
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif data[:2] == b"\xff\xd8":
        start = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        data[start + 5 : start + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
    elif name == "webp":
        data[26:30] = struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
    elif data[12:16] == b"VP8X":
        data[24:30] = struct.pack("<I", width & 0xFFFFFF)[:3] + struct.pack("<I", height & 0xFFFFFF)[:3]
    return bytes(data)


def solid(
    width: int, height: int, *more: tuple[bytes, bytes], colour: int = 2, depth: int = 8, laced: int = 0
) -> bytes:
    """A PNG of zeros that are really there, however few bytes they take; more: chunks after the header."""
    channels = {0: 1, 2: 3, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, laced)
    rows = zlib.compress(bytes((width * channels * depth // 8 + 1) * height), 1)
    return pictures.png_of([(b"IHDR", header), *more, (b"IDAT", rows), (b"IEND", b"")])


def bombs() -> dict[str, tuple[bytes, str]]:
    """Return files that cost as much as they can, and what becomes of them."""
    profile = b"a\0\0" + zlib.compress(bytes(100_000_000), 1)
    side, jpeg = 7999, SEEDS["jpeg"]
    return {
        "64 million with opacity": (solid(side, side, colour=6), "taken"),
        "too many": (solid(8001, 8000, colour=0), "BadImage"),
        "the most that a PNG can say": (resized("png", 2**31 - 1, 2**31 - 1), "BadImage"),
        "the most that a JPEG can say": (resized("jpeg", 65535, 65535), "BadImage"),
        "the most that a WebP can say": (resized("webp", 16383, 16383), "BadImage"),
        "a profile of 100 MB": (solid(9, 9, (b"iCCP", profile)), "BadImage"),
        "a text of 100 MB": (solid(9, 9, (b"zTXt", profile)), "BadImage"),
        "10,000 texts": (solid(9, 9, *[(b"tEXt", b"a\0" + b"b" * 9000)] * 10_000), "BadImage"),
        "a square of 16 bits": (solid(2000, 2000, colour=0, depth=16, laced=1), "BadImage"),
        "rows that are cut": (resized("png", side, side), "BadImage"),
        "1,000 comments": (jpeg[:2] + (b"\xff\xfe\xff\xff" + bytes(65533)) * 1000 + jpeg[2:], "taken"),
        "20 MB of padding": (jpeg[:2] + b"\xff" * 20_000_000 + jpeg[2:], "BadImage"),
        "400,000 empty chunks": (solid(9, 9, *[(b"prVt", b"")] * 400_000), "BadImage"),
    }


def test_crafted_images_stay_within_the_limits(sandbox):
    for name, (data, verdict) in bombs().items():
        assert sandbox((data, False)) == verdict, name


@pytest.mark.parametrize("name", SEEDS)
def test_what_is_not_damaged_is_taken(sandbox, name):
    assert sandbox((SEEDS[name], True)) == "taken"
    assert sandbox((SEEDS[name], False)) == ("BadImage" if name in ("gif", "bmp", "tiff") else "taken")


@cases(0.1)
@given(
    st.sampled_from(sorted(SEEDS)), byte_edits(6, nasty=(*NASTY[:8], *MARKERS)), st.sampled_from([False, False, True])
)
def test_damaged_images_decode_or_are_bad(sandbox, name, edits, converts):
    sandbox((edited(SEEDS[name], edits), converts))


@cases(0.06)
@given(
    st.sampled_from(PNGS),
    st.lists(st.tuples(st.integers(0, 20), byte_edits(2), st.booleans()), max_size=3),
    st.booleans(),
)
def test_pngs_whose_checksums_hold(sandbox, name, changes, converts):
    parts = chunks(SEEDS[name])
    for number, edits, inside in changes:
        kind, data = parts[number % len(parts)]
        if inside and kind == b"IDAT":
            data = zlib.compress(edited(zlib.decompress(dict(chunks(SEEDS[name]))[kind]), edits))
        else:
            data = edited(data, edits)
        parts[number % len(parts)] = kind, data
    sandbox((pictures.png_of(parts), converts))


@cases(0.04)
@given(st.sampled_from(sorted(SEEDS)), SIZES, SIZES, byte_edits(1))
@example("progressive", 8000, 8000, [])
@example("png", 8000, 8000, [])
@example("rgba", 8000, 8000, [])
def test_sizes_that_lie(sandbox, name, width, height, edits):
    sandbox((edited(resized(name, width, height), edits), False))
