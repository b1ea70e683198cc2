"""Linear segmentation: mIoU by hand, the probe against scikit-learn, scenes of shapes, and what cannot be used."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from timm.models import save_for_hf
from torch.nn import functional as F

from maedistill.errors import ConfigError, DataError, NumericsError
from maedistill.evaluation import segmentation
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.linear_probe import LinearHeads, ProbeRecipe, fit_heads
from maedistill.evaluation.masks import find_pairs, read_ahead, read_pair
from maedistill.evaluation.segmentation import (
    SegmentationScore,
    Segmenter,
    SegmentSpec,
    confusion,
    pixel_loss,
    score_segmentation,
    upsample,
)
from maedistill.weights.backbone import open_dense
from tests.conftest import two_at_a_time
from tests.evaluation.tool import evaluate

CPU = torch.device("cpu")
VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
HEADER, GAP = 52, 4  # pixels, of report/sheet.py
COLOURS = np.array([(200, 40, 40), (40, 180, 60), (60, 60, 220), (220, 200, 40)])


def test_miou_of_a_small_table():
    """Class 0: 3 of 3 + 1 + 0, class 1: 2 of 2 + 1 + 1, class 3: 0 of 0 + 0 + 1; class 2 occurs nowhere."""
    truth = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 255]], dtype=torch.uint8)
    found = torch.tensor([[0, 0, 0, 1], [1, 1, 3, 2]])
    score = SegmentationScore(confusion(truth, found, 4, ignore=255))
    assert score.ious == {0: 3 / 4, 1: 2 / 4, 3: 0.0}
    metrics = score.metrics()
    assert metrics["miou"] == pytest.approx((3 / 4 + 2 / 4 + 0) / 3)
    assert (metrics["pixels_correct"], metrics["pixels"], metrics["pixel_accuracy"]) == (5, 7, 5 / 7)
    assert score.line() == "mIoU 41.67 % of 3 classes, pixels 71.43 % (5 of 7)"


def test_miou_is_that_of_scikit_learn():
    draws = np.random.default_rng(0)
    truth, found = draws.integers(0, 9, (2, 40, 50))
    truth[draws.random(truth.shape) < 0.1] = 255
    score = SegmentationScore(
        confusion(torch.from_numpy(truth.astype(np.uint8)), torch.from_numpy(found), 9, ignore=255)
    )
    seen = truth != 255
    assert score.metrics()["miou"] == pytest.approx(jaccard_score(truth[seen], found[seen], average="macro"))


@pytest.mark.parametrize("size", [(7, 7), (16, 12), (5, 31)])
def test_upsampling_and_loss_are_those_of_torch(size):
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 6, 5, generator=draws)
    masks = torch.randint(6, (3, *size), generator=draws, dtype=torch.uint8)
    masks[masks == 5] = 255
    expected = F.interpolate(logits.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsample(logits, size).permute(0, 3, 1, 2), expected, rtol=0, atol=1e-5)
    loss = F.cross_entropy(expected, masks.long(), ignore_index=255)
    torch.testing.assert_close(pixel_loss(logits, masks, ignore=255), loss, rtol=1e-5, atol=0)
    assert pixel_loss(logits, torch.full_like(masks, 255), ignore=255) == 0, "a batch without a class"


def test_the_probe_comes_near_logistic_regression_on_the_same_patches():
    """Masks at the size of the maps: each cell is then a sample of scikit-learn's."""
    centres = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    parts = []
    for seed in (1, 2):
        draws = torch.Generator().manual_seed(seed)
        masks = torch.randint(5, (40, 6, 6), generator=draws, dtype=torch.uint8)
        maps = centres[masks.long()] + 1.3 * torch.randn(40, 6, 6, 16, generator=draws)
        parts.append((maps * torch.logspace(-1, 2, 16) + torch.linspace(-9, 30, 16), masks))
    (maps, masks), (others, truth) = parts
    ignored = masks.clone()
    ignored[:, 0] = 255  # the first row of every mask is no class
    recipe, rates = ProbeRecipe(30, 10, "adamw"), [1e-3, 1e-2, 3e-2]
    loss = lambda logits, masks: pixel_loss(logits, masks, ignore=255)  # noqa: E731
    heads = fit_heads(maps, ignored, recipe, rates=rates, num_classes=5, device=CPU, loss=loss)
    rows, known = maps[:, 1:].reshape(-1, 16), masks[:, 1:].flatten()
    mean, std = rows.mean(0), rows.std(0)
    oracle = LogisticRegression(C=1e4, max_iter=2000).fit(((rows - mean) / std).numpy(), known.numpy())
    expected = oracle.score(((others.reshape(-1, 16) - mean) / std).numpy(), truth.flatten().numpy())
    assert 0.6 < expected < 0.95
    found = [float((logits.argmax(-1) == truth).float().mean()) for logits in heads(others)]
    assert max(found) == pytest.approx(expected, abs=0.01)
    alone = fit_heads(maps, ignored, recipe, rates=rates[1:2], num_classes=5, device=CPU, loss=loss)
    assert torch.equal(alone.heads[0].weight, heads.heads[1].weight), "each rate trains as it would alone"


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """A ViT, a ResNet and a Swin with random weights."""
    folder = tmp_path_factory.mktemp("dense")
    swin = {"img_size": 56, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
    for name, model, arguments, size in (
        ("vit", "vit_tiny_patch16_224", VIT, 32),
        ("resnet", "resnet10t", {}, 64),
        ("swin", "swin_tiny_patch4_window7_224", swin, 56),
    ):
        torch.manual_seed(0)
        network = timm.create_model(model, num_classes=0, **arguments)
        if name == "vit":
            torch.nn.init.normal_(network.patch_embed.proj.weight, std=0.1)
        config = {"input_size": (3, size, size), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 0.9}
        save_for_hf(network, folder / name, model_args=arguments, data_config=config, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Rectangles on a ground, each class with a colour of its own, in several sizes: 24 to train on, 6 to score on."""
    folder, draws = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for i in range(30):
        height, width = 40 + i, 70 - i
        mask = np.zeros((height, width), np.uint8)
        for c in draws.permutation([1, 2, 3]):
            top, left = draws.integers(0, height - 20), draws.integers(0, width - 20)
            mask[top : top + 20, left : left + 20] = c
        pixels = COLOURS[mask] + draws.normal(0, 15, (height, width, 3))
        mask[:2] = 255
        part = "val" if i >= 24 else "train"
        for kind, array in (("images", pixels.clip(0, 255).astype(np.uint8)), ("masks", mask)):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / part / kind / f"{i}.png")
    return folder


def where(scenes, *parts):
    flags = {"train": ("--images", "--masks"), "val": ("--val-images", "--val-masks")}
    return [word for part in parts for flag, kind in zip(flags[part], ("images", "masks"), strict=True)
            for word in (flag, scenes / part / kind)]  # fmt: skip


@pytest.fixture(scope="module")
def results(launcher, networks, scenes, tmp_path_factory):
    """{(network, processes): (stdout, JSON, picture)}."""
    out = tmp_path_factory.mktemp("segmented")

    def start(case):
        name, ranks = case
        stem = out / f"{name}{ranks}"
        flags = ["--json", f"{stem}.json", "--picture", f"{stem}.png", "--batch", 4, "--workers", ranks, "--lr"]
        words = [networks / name, *where(scenes, "train", "val"), *flags, "0.001,0.01,0.03", "--epochs", 15]
        ended = evaluate(launcher, "segment", *words, *(["--blocks=-2,-1"] if name == "swin" else []), ranks=ranks)
        with Image.open(f"{stem}.png") as picture:
            return ended.out, json.loads(Path(f"{stem}.json").read_text()), np.asarray(picture)

    cases = [("vit", 1), ("vit", 3), ("resnet", 1), ("swin", 1)]
    return two_at_a_time(start, cases)


def test_colours_are_segmented_by_any_network(results):
    for case, (out, result, _) in results.items():
        assert result["classes"] == 4 and result["ious"].keys() == {"0", "1", "2", "3"}, case
        assert result["miou"] == pytest.approx(sum(result["ious"].values()) / 4)
        assert (result["train_images"], result["held_out_images"], result["val_images"]) == (22, 2, 6)
        assert result["pixels"] == sum((40 + i - 2) * (70 - i) for i in range(24, 30)), "each pixel of the masks"
        best = max(result["rates"], key=lambda rate: (rate["miou"], -rate["lr"]))
        assert result["lr"] == best["lr"], "chosen on the held-out images"
        assert out.count("held out: mIoU") == 3 and "of 6 validation images, at lr" in out
    assert results["vit", 1][1]["miou"] > 0.75 and results["swin", 1][1]["miou"] > 0.5
    assert "patches of block 1, after the final norm" in results["vit", 1][0]
    assert "patches of block 0, 1, 14 x 14 x 48" in results["swin", 1][0]


def test_any_number_of_processes_finds_the_same(results):
    (_, alone, picture), (_, together, other) = results["vit", 1], results["vit", 3]
    assert alone == together and (picture == other).all()


def test_the_picture_has_image_mask_and_prediction_of_six(results):
    """A ViT at 32 pixels: enlarged six times, three columns."""
    picture = results["vit", 1][2]
    step = 192 + GAP
    assert picture.shape == (HEADER + 6 * step, 3 * step + GAP, 3)
    mask = picture[HEADER:, GAP + step : GAP + step + 192]
    assert len(np.unique(mask.reshape(-1, 3), axis=0)) >= 4


def test_without_validation_images_the_held_out_ones_are_scored(launcher, networks, scenes):
    words = [networks / "vit", *where(scenes, "train"), "--lr", "0.01", "--epochs", 2, "--classes", 9, "--workers", 0]
    out = evaluate(launcher, "segment", *words).out
    assert "of 2 held-out images, which also chose the rate" in out and "9 classes" in out


def test_maps_of_several_blocks_stand_side_by_side_and_the_norm_is_the_last(networks):
    images = torch.randn(2, 3, 32, 32)
    both = open_dense(str(networks / "vit"), blocks=[1, -2]).module
    network = both.network
    found = network.forward_intermediates(images, intermediates_only=True)
    assert torch.equal(both(images), torch.cat([found[1], found[0]], dim=1).permute(0, 2, 3, 1))
    end = open_dense(str(networks / "vit")).module(images)
    tokens = network.forward_features(images)[:, 1:]
    torch.testing.assert_close(end.flatten(1, 2), tokens, rtol=0, atol=1e-5)
    for blocks, what in (([2], "no block 2"), ([0, -2], "block 0 twice")):
        with pytest.raises(ConfigError, match=what):
            open_dense(str(networks / "vit"), blocks=blocks)


def test_a_rate_that_diverges_on_all_images_alone_is_an_error(networks, tmp_path, monkeypatch):
    """The layer would say class 0 everywhere."""
    numbers = np.arange(48, dtype=np.uint8).reshape(6, 8) % 4
    for name in "abcd":
        Image.fromarray(numbers).save(tmp_path / f"{name}.png")
    fit = Segmenter.fit

    def diverges(self, maps, *others):
        heads = fit(self, maps, *others)
        torch.nn.init.constant_(heads.heads[0].weight, float("nan") if len(maps) == 4 else 0.0)
        return heads

    monkeypatch.setattr(Segmenter, "fit", diverges)
    places = (tmp_path,) * 4
    spec = SegmentSpec(str(networks / "vit"), *places[:2], val_images=places[2], val_masks=places[3])
    with pytest.raises(NumericsError, match=r"diverged at lr 0\.01 on all images"):
        score_segmentation(spec, EvalContext(CPU, 2, workers=0), ProbeRecipe(1, 4, "adamw"), rates=[0.01])


def test_a_folder_that_is_closed_or_has_too_long_a_name_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="is not a folder"):
        find_pairs(tmp_path / ("x" * 300), tmp_path)
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(os.scandir(tmp_path / "none")))
    with pytest.raises(DataError, match="cannot be read"):
        find_pairs(tmp_path, tmp_path)


def test_the_number_that_is_no_class_is_never_predicted(networks, tmp_path):
    """As 0 in ADE20k: the layer would say it everywhere."""
    numbers = np.arange(48, dtype=np.uint8).reshape(6, 8) % 4
    Image.fromarray(numbers).save(tmp_path / "a.png")
    pairs = find_pairs(tmp_path, tmp_path)
    probe = Segmenter(open_dense(str(networks / "vit")), EvalContext(CPU, 2, workers=0), 4, ignore=0)
    heads = LinearHeads(32, 4, rates=[1.0]).eval()
    torch.nn.init.zeros_(heads.heads[0].weight)
    heads.heads[0].bias.data = torch.tensor([9.0, 1.0, 3.0, 2.0])
    expected = torch.zeros(4, 4, dtype=torch.int64)
    expected[1:, 2] = 12  # each class has a quarter of the pixels
    assert torch.equal(probe.score(pairs, heads)[0], expected)


def test_large_photographs_are_scored_in_strips_and_not_kept(networks, tmp_path, monkeypatch):
    """Strips of one row and of all rows find the same; of a photograph, only what the network sees is kept."""
    draws = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(draws.integers(0, 5, (90, 70 + i), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    pairs = find_pairs(tmp_path, tmp_path)
    probe = Segmenter(open_dense(str(networks / "vit")), EvalContext(CPU, 2, workers=0), 5, ignore=3)
    maps = torch.randn(2, 8, 8, 32, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(probe, "predictor", lambda images: maps[: len(images)])
    heads = LinearHeads(32, 5, rates=[1.0, 2.0]).eval()
    torch.nn.init.normal_(heads.heads[1].weight, generator=torch.Generator().manual_seed(0))
    kept, sizes = [], []

    def noted(*arguments, threads):
        for item in read_ahead(*arguments, threads=threads):
            kept.append([tuple(part.shape) for part in item])
            yield item

    def blended(*arguments):
        sizes.append(blend(*arguments).numel())
        return blend(*arguments)

    blend = segmentation.blend
    monkeypatch.setattr(segmentation, "read_ahead", noted)
    monkeypatch.setattr(segmentation, "blend", blended)
    whole = probe.score(pairs, heads)
    assert len(sizes) == 6 and max(sizes) == 90 * 72 * 5
    assert kept == [[(3, 32, 32), (90, 70 + i)] for i in range(3)]
    expected = torch.zeros(5, 5, dtype=torch.int64)
    for _, found, mask in probe._maps(pairs):
        logits = upsample(heads(found[None])[1].detach(), mask.shape)[0]
        logits[..., 3] = -torch.inf
        expected += confusion(mask, logits.argmax(-1), 5, ignore=3)
    assert torch.equal(whole[1], expected) and len(expected.sum(0).nonzero()) > 1
    monkeypatch.setattr(segmentation, "_STRIP", 3 * 72 * 5)
    sizes.clear()
    assert all(map(torch.equal, probe.score(pairs, heads), whole)) and max(sizes) == 3 * 72 * 5


def test_files_are_read_in_order_whatever_the_threads():
    assert list(read_ahead(lambda item: item**2, range(50), threads=3)) == [i**2 for i in range(50)]


@pytest.mark.parametrize("mode", ["P", "1"])
def test_palettes_and_bits_are_class_numbers(tmp_path, mode):
    """VOC's masks are palettes; a mask of one class may have one bit."""
    numbers = np.array([[0, 1], [1, 0]], np.uint8)
    mask = Image.fromarray(numbers * (255 if mode == "1" else 1))
    mask = mask.convert("1") if mode == "1" else mask
    if mode == "P":
        mask.putpalette([0, 0, 0, 128, 0, 0])
    Image.new("RGB", (2, 2)).save(tmp_path / "a.jpg")
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks" / "a.png")
    (pair,) = find_pairs(tmp_path, tmp_path / "masks")
    assert read_pair(pair, num_classes=2, ignore=255)[1].tolist() == numbers.tolist()


GRAY = Image.new("L", (8, 6), 1)
MISTAKES = {  # files of images, of masks, flags: exit code, cause, remedy
    "no folder": ({}, {}, ["--masks", "nowhere"], 2, "--masks: nowhere is not a folder", "correct the path"),
    "no masks": ({"a.png": GRAY}, {"b.txt": None}, [], 3, "holds no .png", "annotations/training"),
    "no images": ({"a.gif": GRAY}, {"a.png": GRAY}, [], 3, "holds no .jpg or .jpeg or .png", "themselves"),
    "twice": ({"a.png": GRAY, "a.jpg": GRAY}, {"a.png": GRAY}, [], 3, "holds two files of one name", "one for each"),
    "lonely": ({"a.png": GRAY, "b.png": GRAY}, {"a.png": GRAY}, [], 3, "have no counterpart", "a mask NAME.png"),
    "sizes": ({}, {"a.png": GRAY.resize((6, 8))}, [], 3, "a.png has 6 x 8 pixels and", "one size"),
    "classes": ({}, {"b.png": Image.new("L", (8, 6), 7)}, ["--classes", "7"], 3, "has class 7, but", "--classes"),
    "RGB": ({}, {"a.png": GRAY.convert("RGB")}, [], 3, "pixels of mode RGB with 8 bits", "mode L or P"),
    "16 bits": ({}, {"a.png": GRAY.convert("I").convert("I;16")}, [], 3, "with 16 bits", "mode L or P"),
    "all ignored": ({}, {"c.png": Image.new("L", (8, 6), 255)}, [], 3, "only the value 255", "--ignore"),
    "damaged": ({"b.png": None}, {}, [], 3, "b.png cannot be decoded", "remove it"),
    "two images": ({}, {}, [], 2, "2 images are too few to train on and to choose", "3 or more"),
    "no such block": ({}, {}, ["--blocks", "2"], 2, "has no block 2: there are 2", "--block"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_two_lines_before_any_training(two_lines, networks, tmp_path, name):
    images, masks, flags, code, cause, remedy = MISTAKES[name]
    stems = () if "a.gif" in images or "a.jpg" in images or "b.txt" in masks or name == "lonely" else "abc"
    stems = "ab" if name == "two images" else stems
    for kind, files in (("images", images), ("masks", masks)):
        (tmp_path / kind).mkdir()
        for file, picture in ({f"{stem}.png": GRAY for stem in stems} | files).items():
            picture.save(tmp_path / kind / file) if picture else (tmp_path / kind / file).write_bytes(b"\x89PNG")
    places = ["--images", tmp_path / "images", "--masks", tmp_path / "masks"]
    error, fix, out = two_lines(code, "segment", networks / "vit", *places, *flags)
    assert cause in error and remedy in fix and "probe" not in out
