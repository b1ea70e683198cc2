"""The loader's benchmark: it measures what it says, on the same crops for all, and nothing of it is left."""

import itertools
import json
import multiprocessing

import pytest
import torch
from PIL import Image

from maedistill.benchmark import loader
from maedistill.benchmark.loader import measure_loader, plain_batches, sample, write_folder
from maedistill.data.images.decode import decode_rgb
from maedistill.data.shards.reader import ShardReader
from maedistill.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # torch's own threads
TINY = {"size": 16, "images": 64, "rounds": 2}


@pytest.mark.parametrize(("workers", "views"), [(0, 1), (1, 2)])
def test_every_path_is_measured_and_set_against_the_others(shards, tmp_path, workers, views):
    train, val = str(shards / "train-*.tar"), str(shards / "val-*.tar")
    threads = torch.get_num_threads()
    report = measure_loader(train, workers=workers, views=views, against=val if views > 1 else None, **TINY)
    paths, stages = report.tables.values()
    names = [row["path"] for row in paths]
    assert ("ours, torchvision" in names) == (workers > 0)
    assert {
        "ours in one process",
        "ours, kept",
        "plain loader",
        "decode + crop, torchvision",
        "decode, torchvision",
    } <= set(names)
    plain = next(row for row in paths if row["path"] == "plain loader")
    assert plain["x plain"].median == 1
    for row in paths:
        assert row["per second"].median > 0 and row["per core-second"].median > 0
    assert [row["stage"].split()[0] for row in stages] == ["read", "header", "decode", "crop", "collate", "transfer"]
    report.write_json(tmp_path / "loader.json", command=["benchmark.py"])
    found = json.loads((tmp_path / "loader.json").read_text())["tables"]
    assert any("data.keep_decoded leaves them" in remark for remark in report.remarks)
    assert "plain loader" in "\n".join(report.lines()) and len(next(iter(found.values()))) == len(paths)
    assert torch.get_num_threads() == threads and not multiprocessing.active_children()


def test_all_paths_make_the_same_number_of_crops(shards):
    sampled = sample(str(shards / "train-*.tar"), size=16, views=2, workers=1, images=24)
    for name, work in loader.loader_paths(sampled, workers=1).items():
        first, *others = work()
        assert sum(others) == sampled.batch * sampled.steps == 24, name
        assert first in (0, sampled.batch * sampled.warm_up), name


def test_the_path_of_kept_images_makes_the_same_crops_and_opens_no_file(shards, monkeypatch):
    sampled, made = sample(str(shards / "train-*.tar"), size=16, views=1, workers=0, images=24), []
    fetch = loader.RandomCrops.__getitems__
    monkeypatch.setattr(loader.RandomCrops, "__getitems__", lambda crops, at: made.append(fetch(crops, at)) or made[-1])
    paths = loader.loader_paths(sampled, workers=0)
    sum(paths["ours in one process"]())
    plain = [batch.images for batch in made]
    made.clear()
    monkeypatch.setattr(ShardReader, "read", None)
    sum(paths["ours, kept"]())
    assert len(made) > 1 and all(torch.equal(batch.images, images) for batch, images in zip(made, plain, strict=True))


def test_the_crops_of_the_floor_are_those_of_the_loader(shards):
    sampled = sample(str(shards / "train-*.tar"), size=16, views=2, workers=1, images=8)
    start = sampled.batch * sampled.warm_up
    expected = sampled.crops.__getitems__(list(range(start, start + 8))).images
    found = []
    for i, image_id in enumerate(sampled.measured):
        image = decode_rgb(sampled.data[image_id])
        found += [loader.crop(image, box, size=16) for box in sampled.boxes(i, *image.shape[1:])]
    assert torch.equal(torch.stack(found), expected)


def test_the_plain_path_is_the_usual_one(tmp_path):
    """Values of a plain colour: scaled to [0, 1], then normalised with ImageNet's mean and deviation."""
    files = []
    for colour in [(255, 0, 51), (0, 255, 102)]:
        Image.new("RGB", (40, 30), colour).save(tmp_path / "one.png")
        files.append((tmp_path / "one.png").read_bytes())
    folder = tmp_path / "folder"
    folder.mkdir()
    write_folder(folder, [files[1], files[0], files[1]])
    batches = plain_batches(folder, size=8, batch=2, workers=0)
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.float32
    for image, colour in zip(images, [(0, 255, 102), (255, 0, 51), (0, 255, 102)], strict=True):
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(image[:, 3, 5], (torch.tensor(colour) / 255 - mean) / std)
    assert len({float(value) for value in itertools.chain(*images[0].flatten(1).tolist())}) == 3


def test_several_workers_have_so_many_batches_that_a_lead_says_little(shards):
    one, three = (sample(str(shards / "train-*.tar"), size=16, views=1, workers=n, images=64) for n in (1, 3))
    assert one.steps == 2 and three.steps >= 16 * 3


def test_too_few_images_are_refused(shards):
    with pytest.raises(ConfigError, match="--images: 63 are too few"):
        measure_loader(str(shards / "train-*.tar"), workers=0, views=1, **TINY | {"images": 63})


def test_a_negative_number_of_workers_is_refused(shards):
    with pytest.raises(ConfigError, match="--workers is -1"):
        measure_loader(str(shards / "train-*.tar"), workers=-1, views=1, **TINY)
