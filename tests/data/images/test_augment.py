"""RandAugment: timm's, decided by (seed, position) alone; and what the flip after it changes."""

import random

import numpy as np
import pytest
import timm.data.auto_augment as theirs
import torch
from PIL import Image, ImageOps
from timm.data import create_transform

from maedistill.data.images.augment import RandAugment, seed_generators
from maedistill.errors import ConfigError
from maedistill.randomness import Stream, key

SPEC, MEAN, SIZE, SEED = "rand-m9-mstd0.5-inc1", (0.485, 0.456, 0.406), 48, 5


def photograph(size: int = SIZE) -> Image.Image:
    """Smooth colours with edges, no symmetry."""
    row, column = np.mgrid[0:size, 0:size] / size
    waves = [np.sin(7 * row + 3 * column), np.cos(5 * column * row), (column > 0.3) * np.sin(9 * row)]
    return Image.fromarray((127 * (1 + np.stack(waves, -1))).astype(np.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, s, s]


@pytest.mark.parametrize("spec", [SPEC, "rand", "rand-m14-mmax15-n3-p0.7-tweights", "rand-m9-mstd101-inc1"])
def test_crops_are_augmented_as_timms_training_transform_does(spec):
    """Also the numbers that the generators are seeded with are part of every run's result."""
    keywords = {"auto_augment": spec, "interpolation": "bicubic", "mean": MEAN, "separate": True}
    _, reference, _ = create_transform(SIZE, is_training=True, **keywords)
    ours, changed = RandAugment(spec, size=SIZE, mean=MEAN, seed=SEED), 0
    for position in (*range(40), 10**15):
        random.seed(key(SEED, Stream.AUGMENT, position, 1) % 2**64)
        word = key(SEED, Stream.AUGMENT, position, 2) % 2**64
        np.random.seed([word % 2**32, word // 2**32])
        expected = pixels(reference(photograph()))
        found = ours(pixels(photograph()), position)
        assert found.dtype == torch.uint8 and torch.equal(found, expected)
        changed += not torch.equal(found, pixels(photograph()))
    assert changed > 20


@pytest.mark.parametrize("spec", ["rand-m10-n1-p1-inc1", "rand-m15-mmax15-n1-p1-inc1", "rand-m0-n1-p1"])
def test_an_image_of_which_posterize_keeps_no_bit_is_black(spec):
    """Pillow 13 refuses that, and in MAE's recipe it happens to one crop in five hundred."""
    ours = RandAugment(spec, size=SIZE, mean=MEAN, seed=SEED)
    black = [not ours(pixels(photograph()), position).any() for position in range(300)]
    assert 7 <= sum(black) <= 38  # 300 / 15 = 20


def test_nothing_but_seed_and_position_decides():
    ours = RandAugment(SPEC, size=SIZE, mean=MEAN, seed=SEED)
    crop, positions = pixels(photograph()), [*range(30)]
    plain = {position: ours(crop, position).numpy().tobytes() for position in positions}
    assert len(set(plain.values())) > 20
    random.shuffle(positions)
    for position in positions:
        random.seed()
        np.random.seed()
        assert ours(crop, position).numpy().tobytes() == plain[position]
    other = RandAugment(SPEC, size=SIZE, mean=MEAN, seed=SEED + 1)
    assert sum(other(crop, position).numpy().tobytes() != plain[position] for position in positions) > 20


def test_seeding_reaches_every_generator_and_ties_none_to_another():
    def drawn(*parts):
        seed_generators(*parts)
        return random.random(), np.random.random(), float(torch.rand((), dtype=torch.float64)), float(torch.randn(()))

    assert drawn(3, Stream.NETWORK, 0, 1) == drawn(3, Stream.NETWORK, 0, 1)
    several = np.array([drawn(3, Stream.NETWORK, step, 1) for step in range(500)])  # [500, 4]
    assert all(len(set(column)) == 500 for column in several.T)
    # python's generator and numpy's are the same algorithm: equal seeds would give equal numbers
    assert np.abs(np.corrcoef(several.T) - np.eye(4)).max() < 0.2


@pytest.mark.parametrize("name", sorted({*theirs._RAND_INCREASING_TRANSFORMS, *theirs._RAND_TRANSFORMS}))
def test_flipping_after_an_operation_is_flipping_before_it_with_the_other_sign(name, monkeypatch):
    """Why the flip may stay on the device: both signs are equally likely. ShearY alone is about one edge."""
    operation = theirs.AugmentOp(name, prob=1.0, magnitude=9, hparams={"interpolation": Image.Resampling.BICUBIC})
    images = photograph(), ImageOps.mirror(photograph())
    first, then = [], []
    for draw in (0.1, 0.9):  # which `_randomly_negate` compares with 0.5
        monkeypatch.setattr(theirs.random, "random", lambda draw=draw: draw)
        then.append(pixels(ImageOps.mirror(operation(images[0]))).int())
        first.append(pixels(operation(images[1])).int())
    distance = min(
        max(float((a - b).abs().float().mean()) for a, b in zip(first, order, strict=True))
        for order in (then, then[::-1])
    )
    assert distance > 5 if name == "ShearY" else distance < 0.1


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "augmix-m3",
        "random-m9",
        "rand-m9.5",
        "rand-m9-inc",
        "rand-m9-twieghts",
        "rand-x3",
        "rand-m",
        "rand-m9-t3a",
        "rand-n16-tweights",
    ],
)
def test_a_spec_that_timm_refuses_or_misreads_is_a_config_error(spec):
    with pytest.raises(ConfigError, match=r"augment\.rand_augment"):
        RandAugment(spec, size=SIZE, mean=MEAN, seed=SEED)
