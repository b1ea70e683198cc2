"""Decoding: the same pixels as an independent path, exact conversions, and nothing but `BadImage` for hostile bytes."""

import io
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maedistill.data.images import decode
from maedistill.data.images.convert import convert
from maedistill.data.images.decode import JPEG_DECODERS, BadImage, decode_rgb
from tests.data.pictures import encode, png


def picture(mode="RGB", size=(24, 17)):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def to_array(tensor):
    assert tensor.dtype == torch.uint8 and tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_files_give_pillows_pixels_and_keep_their_bytes(kind, mode):
    data = encode(picture(mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(to_array(decode_rgb(data)), expected)
    converted = convert(data)
    assert converted.data is data and converted.change is None
    assert converted.is_grayscale == (mode == "L" and kind != "WEBP")  # WebP has no grayscale


def test_all_decoders_give_pillows_pixels_of_500_photographs(shared):
    """Grayscale ones are among them."""
    files, modes = sorted((shared / "data" / "imagenet500").glob("*/*")), set()
    assert len(files) == 500 and len(JPEG_DECODERS) > 1
    for data in map(Path.read_bytes, files):
        image = Image.open(io.BytesIO(data))
        modes.add(image.mode)
        expected = np.asarray(image.convert("RGB"))
        for decoder in JPEG_DECODERS[:-1]:
            assert np.array_equal(to_array(decode_rgb(data, decoder=decoder)), expected)
    assert modes == {"RGB", "L"}


JPEGS = {
    "plain": ("RGB", {}),
    "grayscale": ("L", {}),
    "full chroma": ("RGB", {"subsampling": 0}),
    "progressive": ("RGB", {"progressive": True}),
    "restarts": ("RGB", {"restart_marker_blocks": 1}),
    "coarse": ("RGB", {"quality": 5}),
    "RGB": ("RGB", {"keep_rgb": True}),
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("size", [(64, 48), (61, 43), (8, 9), (1, 1)])
def test_all_decoders_give_the_same_pixels_of_all_kinds_of_jpeg(kind, size):
    mode, options = JPEGS[kind]
    data = encode(picture(mode, size=size), "JPEG", **options)
    expected = decode_rgb(data, decoder="pillow")
    assert expected.shape == (3, size[1], size[0])
    for decoder in JPEG_DECODERS:
        assert torch.equal(decode_rgb(data, decoder=decoder), expected), decoder


def test_without_simplejpeg_torchvision_decodes(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert runpy.run_path(decode.__file__)["JPEG_DECODERS"] == ("torchvision", "pillow")


def test_a_palette_that_is_missing_is_damage():
    """Pillow asserts that it is there."""
    data = png(np.zeros((3, 4, 1)), colour=3, depth=8)
    for read in (decode_rgb, convert):
        with pytest.raises(BadImage):
            read(data)


def test_a_longer_side_than_a_jpeg_has_is_a_bad_image():
    with pytest.raises(BadImage, match="70000 x 100 "):
        convert(encode(Image.new("L", (140_000, 200)), "PNG"), shorter_side=100)


def test_transparent_pixels_show_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert decode_rgb(encode(image, "PNG"))[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]
    assert decode_rgb(encode(image, "WEBP", lossless=True))[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]


def odd_files():
    red, blue = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
    sequence = {"save_all": True, "append_images": [blue]}
    return {
        "CMYK": (encode(picture("CMYK"), "JPEG"), picture("CMYK").convert("RGB")),
        "palette": (encode(picture("P"), "PNG"), picture("P").convert("RGB")),
        "1-bit": (encode(picture("1"), "PNG"), picture("1").convert("RGB")),
        "animated": (encode(red, "WEBP", lossless=True, **sequence), red),
        "GIF": (encode(red, "GIF", **sequence), red),
        "BMP": (encode(picture(), "BMP"), picture()),
        "TIFF": (encode(picture(), "TIFF"), picture()),
    }


@pytest.mark.parametrize("change", odd_files())
def test_odd_files_become_plain_png(change):
    data, expected = odd_files()[change]
    converted = convert(data)
    assert (converted.change, converted.suffix) == (change, "png")
    plain = Image.open(io.BytesIO(converted.data))
    assert (plain.format, plain.mode, getattr(plain, "is_animated", False)) == ("PNG", "RGB", False)
    difference = np.asarray(plain).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= (40 if change == "CMYK" else 0)  # only the CMYK file is lossy


def test_shrinking_touches_larger_images_only():
    large, small = encode(picture(size=(90, 60)), "PNG"), encode(picture(size=(30, 20)), "PNG")
    shrunk = convert(large, shorter_side=20, quality=95)
    assert decode_rgb(shrunk.data).shape == (3, 20, 30) and (shrunk.suffix, shrunk.change) == ("jpg", "shrunk")
    assert convert(small, shorter_side=20).data is small


def test_a_jpeg_of_very_many_scans_is_refused_before_decoding():
    data = encode(picture(size=(2000, 2000)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert decode_rgb(data).shape == (3, 2000, 2000)
    with pytest.raises(BadImage, match="2,009 scans of 2000 x 2000 pixels"):
        decode_rgb(data[:last] + data[last:-2] * 2000 + data[-2:])


def test_what_pillow_warns_about_is_no_error_and_no_noise(launcher, tmp_path):
    two = encode(picture(), "MPO", save_all=True, append_images=[picture()])
    damaged = two.replace(b"MPF\0", b"MPF\0\xff\xff", 1)  # "malformed MPO file"
    code = "import warnings; from maedistill.data.images.decode import decode_rgb\n"
    code += "warnings.simplefilter('error', append=True)  # behind ours\n"
    code += f"print(tuple(decode_rgb({damaged!r}).shape))"
    ended = launcher.start_text(tmp_path, code).finish()
    assert ended.out.strip() == "(3, 17, 24)" and "PIL" not in ended.err


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cut_files_are_bad(kind):
    data = encode(picture(size=(64, 64)), kind)
    for length in (0, 5, len(data) // 3, len(data) // 2, len(data) - 40):
        with pytest.raises(BadImage):
            decode_rgb(data[:length])


def verdict(decoder, data):
    try:
        return decode_rgb(data, decoder=decoder).numpy().tobytes()
    except BadImage as error:
        return str(error)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    edits=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.sampled_from([0] * 5 + [10, 25, 50]),
)
def test_all_decoders_judge_a_damaged_jpeg_alike(edits, cut):
    """Otherwise what a run reads would depend on what is installed."""
    data = bytearray(encode(picture(size=(40, 30)), "JPEG"))
    for position, value in edits:
        data[position % len(data)] = value
    damaged = bytes(data[: len(data) - cut])
    assert len({verdict(decoder, damaged) for decoder in JPEG_DECODERS}) == 1
