"""Bit depth: images of more than 8 bits are scaled by the depth that they use, and not clipped."""

import numpy as np
import pytest
import torch

from maedistill.data.images.convert import bits_in_use, convert
from maedistill.data.images.decode import decode_rgb
from maedistill.data.images.depth import DEPTHS, UNKNOWN, to_eight_bits, used_bits
from tests.data.pictures import png, tiff


def to_array(tensor):
    assert tensor.dtype == torch.uint8 and tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy()


WIDE = {
    "PNG": lambda pixels: png(pixels[..., :3], colour=2, depth=16),
    "PNG with alpha": lambda pixels: png(pixels, colour=6, depth=16),
    "gray PNG with alpha": lambda pixels: png(pixels[..., [0, 3]], colour=4, depth=16),
    "TIFF": lambda pixels: tiff(pixels[..., :3], order="II"),
    "TIFF with alpha": lambda pixels: tiff(pixels, order="MM"),
    "compressed TIFF": lambda pixels: tiff(pixels[..., :3], order="MM", compressed=True),
    "compressed TIFF with alpha": lambda pixels: tiff(pixels, order="II", compressed=True),
}


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", WIDE)
def test_sixteen_bit_colour_is_scaled_by_the_depth_that_it_uses(kind, bits):
    pixels = np.random.default_rng(1).integers(0, 1 << bits, (6, 7, 4)).astype(np.uint16)
    pixels[0, 0], pixels[..., 3] = (1 << bits) - 1, 65535
    data = WIDE[kind](pixels)
    assert bits_in_use(data) == bits
    exact = pixels[..., [0, 0, 0] if "gray" in kind else [0, 1, 2]] * 255.0 / ((1 << bits) - 1)
    found = to_array(decode_rgb(convert(data).data))
    assert np.abs(found - exact).max() <= (0.5 if bits < 16 else 1)  # of large values Pillow's high byte is enough
    pixels[3:, :, 3] = 0
    if "alpha" in kind:
        found = to_array(decode_rgb(convert(WIDE[kind](pixels)).data))
        assert np.abs(found[:3] - exact[:3]).max() <= 1 and (found[3:] == 255).all()


def test_dark_colour_of_which_pillow_reads_the_high_bytes_alone_has_no_known_depth():
    pixels = np.tile([4095, 4095, 4095, 65535], (6, 7, 1))
    assert bits_in_use(tiff(pixels, order="II", alpha=1)) == UNKNOWN
    assert bits_in_use(tiff(pixels | 16384, order="II", alpha=1)) == 16


@pytest.mark.parametrize("bits", DEPTHS)
@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_shards_of_others_with_16_bit_images_are_scaled_by_the_depth_in_use(bits, colour, channels):
    ramp = np.linspace(0, 2**bits - 1, 256).round().astype(np.uint16)
    pixels = np.repeat(np.repeat(ramp[None, :, None], 2, 0), channels, 2)  # [2, 256, channels]
    if channels in (2, 4):
        pixels[..., -1] = 65535  # opaque
    found = decode_rgb(png(pixels, colour=colour, depth=16))[:, 0].int()
    assert (found - torch.arange(256)).abs().max() <= (1 if bits == 16 else 0)


def test_the_depth_is_the_smallest_usual_one():
    largest = {0: 8, 255: 8, 256: 10, 1023: 10, 1024: 12, 4095: 12, 4096: 14, 16384: 16, 65535: 16}
    for value, bits in largest.items():
        assert used_bits(np.array([[0, value]], dtype=np.uint16)) == bits
    exact = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(to_eight_bits(exact, 16), (exact.astype(np.uint32) + 128) // 257)  # as it always was
