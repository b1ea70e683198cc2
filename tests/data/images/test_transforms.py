"""Crops and flips: torchvision's RandomResizedCrop with our draws, Pillow's resize, decided by (seed, position)."""

import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as vision

from maedistill.data.images.decode import decode_rgb
from maedistill.data.images.transforms import (
    CROP_DRAWS,
    crop,
    normalize,
    random_box,
    random_flip,
    to_float01,
)
from maedistill.randomness import Stream, uniform

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
SHAPES = [(375, 500), (500, 375), (32, 32), (64, 1000), (1000, 64), (1, 300), (300, 1), (7, 9)]


def draws(count: int, seed: int = 0) -> list[list[float]]:
    return uniform(seed, torch.arange(count), Stream.CROP, n=CROP_DRAWS).tolist()


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("scale", [SCALE, (0.9, 1.0)])  # the second often tries ten times and falls back
def test_box_sizes_are_torchvisions_for_the_same_draws(height, width, scale):
    theirs = v2.RandomResizedCrop(8, scale=scale, ratio=RATIO)
    image, different = torch.empty(3, height, width), 0
    for seed in range(300):
        torch.manual_seed(seed)
        expected = theirs.make_params([image])
        torch.manual_seed(seed)
        same = [float(torch.rand(1)) for _ in range(CROP_DRAWS)]
        top, left, h, w = random_box(height, width, same, scale=scale, ratio=RATIO)
        assert 0 <= top <= height - h and 0 <= left <= width - w and h >= 1 and w >= 1
        different += (h, w) != (expected["height"], expected["width"])  # torchvision computes in float32
    assert different <= 3


def test_the_draws_are_those_of_every_run_so_far():
    """A change here changes what `seed` means: no older run could be continued or repeated."""
    boxes = [random_box(375, 500, row, scale=SCALE, ratio=RATIO) for row in draws(4, seed=7)]
    assert boxes == [(72, 143, 299, 340), (28, 168, 220, 216), (77, 203, 249, 206), (115, 82, 224, 201)]
    mirrored = random_flip(torch.arange(2.0).expand(24, 3, 1, 2), torch.arange(24), seed=7)[:, 0, 0, 0]
    assert "".join(str(int(value)) for value in mirrored) == "100110110001001011010011"


def test_crops_of_500_photographs_differ_from_the_plain_paths_by_half_a_level_on_average(shared):
    """The plain path: Pillow decodes, crops and resizes, ToTensor scales. The box is the same."""
    files = sorted((shared / "data" / "imagenet500").rglob("*.*"))
    assert len(files) == 500
    for file, row in zip(files, draws(len(files)), strict=True):
        image = decode_rgb(file.read_bytes())
        top, left, height, width = box = random_box(*image.shape[1:], row, scale=SCALE, ratio=RATIO)
        with Image.open(file) as opened:
            plain = vision.resized_crop(
                opened.convert("RGB"), top, left, height, width, [224, 224], interpolation=InterpolationMode.BICUBIC
            )
        difference = (vision.to_tensor(plain) * 255 - crop(image, box, size=224)).abs()
        # the resize rounds its weights, and its result after each of two passes
        assert difference.mean() < 0.5 and (difference > 1.5).float().mean() < 0.02, file


@pytest.mark.parametrize("channels_last", [True, False])
def test_crops_are_torchvisions_bit_for_bit(channels_last):
    random = torch.Generator().manual_seed(0)
    for shape in [(40, 60), (60, 40), (224, 224), (1, 50), (50, 1), (1, 1), (300, 299)]:
        pixels = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=random).permute(2, 0, 1)
        image = pixels if channels_last else pixels.contiguous()
        boxes = [random_box(*shape, row, scale=SCALE, ratio=RATIO) for row in draws(6)]
        for top, left, height, width in [*boxes, (0, 0, *shape), (shape[0] - 1, 0, 1, 1)]:
            for size in (8, 40, 224):
                expected = v2.functional.resized_crop(
                    image, top, left, height, width, [size, size], interpolation=InterpolationMode.BICUBIC
                )
                assert torch.equal(crop(image, (top, left, height, width), size=size), expected)


def test_half_are_mirrored_by_seed_and_position_alone():
    images, positions = torch.rand(1000, 3, 2, 2), torch.arange(1000) + 10**12
    flipped = random_flip(images, positions, seed=1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], images[~mirrored]) and 450 < mirrored.sum() < 550
    order = torch.randperm(1000)
    assert torch.equal(random_flip(images[order], positions[order], seed=1), flipped[order])
    other = (random_flip(images, positions, seed=2) == images.flip(-1)).flatten(1).all(1)
    assert 400 < (other != mirrored).sum() < 600
    # the flip is drawn apart from the crop
    small = torch.tensor([row[0] for row in draws(1000)]) < 0.5
    assert 400 < (random_flip(images, torch.arange(1000), seed=0) != images).flatten(1).any(1).ne(small).sum() < 600


def test_values_are_scaled_and_normalised_per_channel():
    images = to_float01(torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1))
    assert images.dtype == torch.float32 and images.flatten().tolist() == pytest.approx([0, 0.2, 1])
    mean, std = torch.tensor([0.5, 0.1, 0.2]).view(3, 1, 1), torch.tensor([0.5, 0.2, 0.4]).view(3, 1, 1)
    assert normalize(images, mean, std).flatten().tolist() == pytest.approx([-1, 0.5, 2])
