"""Erasing, mixing and soft targets, against a few lines that know only the definitions."""

import pytest
import torch
from timm.data import random_erasing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from maedistill.data.images.augment import seed_generators
from maedistill.data.images.mixing import Mixing
from maedistill.errors import ConfigError

CLASSES, SIZE, SMOOTHING = 10, 12, 0.2
NOTHING = {"mixup": 0.0, "cutmix": 0.0, "mix_probability": 1.0, "switch_probability": 0.5, "erasing": 0.0}
BOTH = NOTHING | {"mixup": 0.8, "cutmix": 1.0}


def mixed(seed, *, batch=8, smoothing=SMOOTHING, **settings):
    """(images and labels before, images and targets after) for one seed."""
    draws = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, SIZE, SIZE, generator=draws)
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


def test_probabilities_say_how_often():
    settings = BOTH | {"mix_probability": 0.5, "switch_probability": 0.2}
    kinds = []
    for seed in range(300):
        images, _, found, _ = mixed(seed, batch=2, **settings)
        still, pasted = torch.equal(found, images), bool(((found == images) | (found == images.flip(0))).all())
        kinds.append("none" if still else "cutmix" if pasted else "mixup")
    assert 115 < kinds.count("none") < 190  # 150, and a few rectangles without pixels
    assert 12 < kinds.count("cutmix") < 50  # 30
    assert 90 < kinds.count("mixup") < 150  # 120


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


def test_the_seed_alone_decides():
    settings = BOTH | {"erasing": 0.5}
    plain = [mixed(seed, **settings)[2:] for seed in range(5)]
    torch.randn(3)
    again = [mixed(seed, **settings)[2:] for seed in reversed(range(5))][::-1]
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert not any(torch.equal(plain[0][0], other[0]) for other in plain[1:])


@pytest.mark.parametrize("settings", [BOTH, NOTHING])
def test_everything_stays_on_the_device_and_nothing_is_read_back(settings, monkeypatch):
    """A stand-in for a GPU: such tensors know their device and refuse to give up a value."""
    mixing = Mixing(CLASSES, smoothing=0.1, device=torch.device("cuda"), **settings | {"erasing": 0.5})
    draw, noise = random_erasing._get_pixels, []
    monkeypatch.setattr(random_erasing, "_get_pixels", lambda *a, **k: noise.append(draw(*a, **k)) or noise[-1])
    with FakeTensorMode():
        images, labels = torch.empty(8, 3, SIZE, SIZE, device="cuda"), torch.empty(8, dtype=torch.int64, device="cuda")
        for seed in range(10):
            seed_generators(seed)
            found, targets = mixing(images, labels)
            assert {part.device.type for part in noise} == {"cuda"}
            assert found.device.type == targets.device.type == "cuda" and targets.shape == (8, CLASSES)


def test_an_odd_batch_is_refused_only_where_it_would_be_mixed():
    for settings in (BOTH, BOTH | {"mixup": 0.0}, BOTH | {"cutmix": 0.0}):
        with pytest.raises(ConfigError, match=r"micro-batch of 7 (.|\n)*engine\.micro_batch even"):
            mixed(0, batch=7, **settings)
    for settings in (NOTHING, BOTH | {"mix_probability": 0.0}):
        assert mixed(0, batch=7, **settings)[3].shape == (7, CLASSES)
