"""RandAugment: timm's, decided by (seed, position) alone; and what the flip after it changes.

Erasing, mixing and soft targets, against a few lines that know only the definitions.
"""

import random

import numpy as np
import pytest
import timm.data.auto_augment as theirs
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch.nn import functional as F

from maedistill.data.images.augment import Mixing, RandAugment, seed_generators
from maedistill.randomness import Stream, key

SPEC, MEAN, SIZE, SEED = "rand-m9-mstd0.5-inc1", (0.485, 0.456, 0.406), 48, 5
CLASSES, SIDE, SMOOTHING = 10, 12, 0.2
NOTHING = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0}
BOTH = NOTHING | {"mixup": 0.8, "cutmix": 1.0}


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


def mixed(seed, *, batch=8, smoothing=SMOOTHING, **settings):
    """(images and labels before, images and targets after) for one seed."""
    draws = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, SIDE, SIDE, generator=draws)
    labels = torch.arange(batch) % CLASSES
    mixing = Mixing(CLASSES, smoothing=smoothing, device=torch.device("cpu"), **settings)
    seed_generators(seed)
    return images, labels, *mixing(images.clone(), labels)


def smoothed(labels, smoothing=SMOOTHING):
    return F.one_hot(labels, CLASSES) * (1 - smoothing) + smoothing / CLASSES  # [B, C]


def test_images_and_targets_are_mixed_in_the_same_proportion():
    shares = {"mixup": [], "cutmix": []}
    for seed in range(60):
        images, labels, found, targets = mixed(seed, **BOTH)
        # the drawn lambda, read off a target: its own class has lam (1 - s) + s / C
        lam = float((targets[0, labels[0]] - SMOOTHING / CLASSES) / (1 - SMOOTHING))
        expected = lam * smoothed(labels) + (1 - lam) * smoothed(labels.flip(0))
        torch.testing.assert_close(targets, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(targets.sum(1), torch.ones(8), rtol=0, atol=1e-6)
        kept, taken = found == images, found == images.flip(0)  # [B, 3, s, s]
        if bool((kept | taken).all()):
            assert kept.float().mean() == pytest.approx(lam, abs=1e-6)
            assert torch.equal(kept, kept[:1, :1].expand_as(kept)), "one rectangle for all"
            rows, columns = taken[0, 0].any(1).sum(), taken[0, 0].any(0).sum()
            assert taken[0, 0].sum() == rows * columns
            shares["cutmix"].append(lam)
        else:
            torch.testing.assert_close(found, lam * images + (1 - lam) * images.flip(0), rtol=0, atol=1e-5)
            shares["mixup"].append(lam)
    assert min(map(len, shares.values())) > 15
    assert all(max(lams) - min(lams) > 0.7 for lams in shares.values()), "lambda is drawn, not set"


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_alpha_says_how_evenly_images_are_mixed(kind):
    for alpha in (300.0, 0.003):  # Beta(300, 300) is 0.5 +- 0.02; Beta(0.003, 0.003) is 0 or 1
        targets = [mixed(seed, smoothing=0.0, **NOTHING | {kind: alpha})[3] for seed in range(20)]
        shares = torch.stack([target[0].sort().values[-2] for target in targets])  # of the lesser image, at most 0.5
        # cut at a border, a rectangle may keep no more than a quarter of its area
        untouched = (shares < 0.01).sum()
        assert (shares > 0.1).all() if alpha > 1 else untouched >= 5 if kind == "cutmix" else untouched == 20


def test_each_kind_has_half_of_the_batches():
    kinds = []
    for seed in range(300):
        images, _, found, _ = mixed(seed, batch=2, **BOTH)
        pasted = bool(((found == images) | (found == images.flip(0))).all())
        kinds.append("cutmix" if pasted else "mixup")
    assert 115 < kinds.count("cutmix") < 185  # 150


def test_erasing_fills_one_rectangle_of_some_images_with_noise_and_nothing_else():
    images, labels, found, targets = mixed(0, batch=1000, **NOTHING | {"erasing": 0.25})
    changed = found != images  # [B, 3, s, s]
    erased = changed.flatten(1).any(1)  # [B]
    assert 195 < erased.sum() < 305
    torch.testing.assert_close(targets, smoothed(labels), rtol=0, atol=1e-6)
    for mask in changed[erased]:
        assert mask[0].sum() == mask[0].any(1).sum() * mask[0].any(0).sum() and torch.equal(
            mask, mask[:1].expand(3, -1, -1)
        )
        assert 0 < mask[0].float().mean() <= 0.5
    noise = found[changed]
    assert noise.unique().numel() > 0.99 * noise.numel(), "each value is drawn for itself"
    assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_mixing_targets_are_torchs_label_smoothing(smoothing):
    images, labels, found, targets = mixed(0, batch=7, smoothing=smoothing, **NOTHING)
    assert torch.equal(found, images) and targets.dtype == torch.float32
    logits = torch.randn(7, CLASSES, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected, rtol=0, atol=1e-6)
