"""Evaluation input: every image once for any ranks and batch, timm's pixels, and no image is ever replaced."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from maedistill.data.images.decode import decode_rgb
from maedistill.data.loading.evaluation import (
    PADDING,
    EvaluationImages,
    evaluation_transform,
    exact_batches,
    rank_share,
    undecodable,
)
from maedistill.data.shards.open_index import open_index
from tests.data.pictures import encode
from tests.data.tar_files import write_tar

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # torch's own threads
N = 101
MEAN, STD = (0.3, 0.5, 0.7), (0.2, 0.25, 0.3)
MODES = [
    {"size": 32, "crop": 0.875},
    {"size": 64, "crop": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
    {"size": (24, 40), "crop": 0.9},
    {"size": 48, "crop": 0.95, "crop_mode": "border", "mean": MEAN},
]


def write_shard(path, members):
    """One shard of {key: (bytes, label)}; every member is called .jpg, whatever it is."""
    files = {f"{key}.jpg": data for key, (data, _) in members.items()}
    labels = {f"{key}.cls": b"%d" % label for key, (_, label) in members.items()}
    return open_index(str(write_tar(path, files | labels)))


def encoded(width, height, form="JPEG", mode="RGB", seed=0) -> bytes:
    """A smooth random picture as a file."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    return encode(image, form)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    members = {f"{i:03d}": (encoded(8, 8, "PNG", seed=i), i % 7) for i in range(N)}
    return write_shard(tmp_path_factory.mktemp("tars") / "val.tar", members)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (7, 0), (64, 0), (7, 2)])
def test_every_image_comes_once_for_any_ranks_batch_and_workers(index, world_size, batch, workers):
    transform, seen, counts = evaluation_transform(size=8, crop=1.0), [], set()
    samples = torch.arange(N)
    for rank in range(world_size):
        mine = EvaluationImages(index, rank_share(samples, rank=rank, world_size=world_size), transform)
        batches = list(exact_batches(mine, batch=batch, workers=workers))
        counts.add(tuple(len(ids) for *_, ids in batches))
        for images, labels, ids in batches:
            assert images.dtype == torch.uint8 and labels.dtype == ids.dtype == torch.int64
            assert torch.equal(labels, torch.where(ids == -1, -1, ids % 7))
            for image, sample in zip(images, ids.tolist(), strict=True):
                assert not image.any() if sample == -1 else torch.equal(image, decode_rgb(mine.reader.read(sample)))
            seen += ids.tolist()
    assert len(counts) == 1, "ranks see equally many batches, of equal sizes"
    assert sorted(sample for sample in seen if sample != -1) == samples.tolist()
    assert len(seen) == N + -N % world_size


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_come_in_the_order_asked_for_and_as_often(index, workers):
    samples = torch.tensor([9, 0, 4, 4, 2])
    asked = EvaluationImages(index, samples, evaluation_transform(size=8, crop=1.0))
    images, labels, ids = map(torch.cat, zip(*exact_batches(asked, batch=2, workers=workers), strict=True))
    assert torch.equal(ids, samples) and torch.equal(labels, samples % 7)
    assert torch.equal(images[2], images[3]) and not torch.equal(images[1], images[2])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_marked_and_not_replaced(tmp_path, workers):
    """It counts as padding does, and can be told from it."""
    whole = encoded(20, 30, "PNG")
    index = write_shard(tmp_path / "a.tar", {"0": (whole, 5), "1": (whole[:300], 2), "2": (whole, 4)})
    asked = EvaluationImages(index, torch.tensor([1, 2]), evaluation_transform(size=8, crop=1.0))
    images, labels, ids = zip(*exact_batches(asked, batch=1, workers=workers), strict=True)
    assert not images[0].any() and images[1].any()
    assert [int(label) for label in labels] == [-1, 4] and [int(i) for i in ids] == [undecodable(1), 2]
    assert undecodable(undecodable(1)) == 1 and undecodable(0) < PADDING


def test_a_share_of_anything_has_the_same_length_on_all_ranks():
    for n in range(8):
        for world_size in range(1, 10):
            shares = [rank_share(torch.arange(n) + 10, rank=rank, world_size=world_size) for rank in range(world_size)]
            together = torch.stack(shares).T.flatten()  # rank varies fastest
            assert together[:n].tolist() == list(range(10, n + 10)) and bool((together[n:] == -1).all())


def check_against_timm(index, files, keywords):
    """Our uint8 images, normalised, are what timm's transform makes of the file as timm opens it."""
    theirs = {"crop_pct": keywords["crop"]} | {k: v for k, v in keywords.items() if k not in ("size", "crop", "mean")}
    reference = create_transform(keywords["size"], mean=MEAN, std=STD, **({"interpolation": "bicubic"} | theirs))
    images = EvaluationImages(index, torch.arange(len(files)), evaluation_transform(**keywords))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for (image, *_), file in zip(exact_batches(images, batch=1, workers=0), files, strict=True):
        with Image.open(io.BytesIO(file)) as opened:
            expected = reference(opened.convert("RGB"))
        torch.testing.assert_close((image[0] / 255 - mean) / std, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keywords", MODES)
def test_pixels_are_timms_own_for_jpegs_of_odd_sizes(tmp_path, keywords):
    files = [encoded(*shape, seed=i) for i, shape in enumerate([(73, 121), (500, 33), (31, 31), (1, 9), (224, 224)])]
    files += [encoded(57, 83, mode="L"), encoded(83, 57, mode="CMYK"), encoded(57, 83, "PNG", "P")]
    check_against_timm(write_shard(tmp_path / "a.tar", {str(i): (f, 0) for i, f in enumerate(files)}), files, keywords)


@pytest.mark.parametrize("keywords", MODES)
@pytest.mark.parametrize("shape", [(60_000, 1), (1, 60_000), (1_000_000, 3)])
def test_an_image_of_extreme_aspect_costs_no_more_than_others(keywords, shape):
    transform = evaluation_transform(**keywords)
    image = Image.new("RGB", shape, (9, 99, 199))
    tracked = []
    with pytest.MonkeyPatch.context() as patched:
        resize = Image.Image.resize
        patched.setattr(
            Image.Image, "resize", lambda self, size, *a, **k: tracked.append(size) or resize(self, size, *a, **k)
        )
        pixels = transform(image)
    height, width = keywords["size"] if isinstance(keywords["size"], tuple) else (keywords["size"],) * 2
    assert pixels.shape == (3, height, width) and pixels[:, height // 2, width // 2].tolist() == [9, 99, 199]
    assert tracked and max(w * h for w, h in tracked) <= 1_000_000  # 60,000 x 1 as a whole: at least 36 x 2,160,000
