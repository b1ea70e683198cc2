"""What sources list: splits by hash, keys, labels, CIFAR-10 in torchvision's own format, folders in every layout."""

import hashlib
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10

from maedistill.data.images.decode import decode_rgb
from maedistill.data.shards import sources
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.reader import ShardReader
from maedistill.data.shards.sources import open_folder, open_source, smallest_hashes
from maedistill.errors import ConfigError, DataError
from tests.data.tar_files import encode


def touch(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def listed(source, split="train"):
    return {record.origin: (record.key, record.label) for record in source.splits[split]}


@given(order=st.permutations(range(20)), count=st.integers(0, 20))
def test_the_split_by_hash_knows_images_not_their_order(order, count):
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 3, 3), dtype=np.uint8)
    rows = smallest_hashes(images, count)
    shuffled = smallest_hashes(images[order], count)
    assert {order[row] for row in shuffled} == set(rows.tolist()) and (np.diff(rows) > 0).all()
    digests = [hashlib.sha256(bytes(image.flatten().tolist())).hexdigest() for image in images]
    assert set(rows.tolist()) == set(np.argsort(digests)[:count].tolist())


def test_the_split_by_hash_is_that_of_the_published_cifar10_shards(shared, tmp_path, monkeypatch):
    # the 5,000 smallest of all 50,000 must be the 5,000 smallest of any part that holds them; all were tried once
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = []
    for name in ("val-000000", "train-000004"):
        index = open_index(str(shared / "data" / "cifar10" / f"{name}.tar"))
        reader = ShardReader(index)
        images += [decode_rgb(reader.read(i)).permute(1, 2, 0).numpy() for i in range(5_000)]
    order = np.random.default_rng(0).permutation(10_000)
    chosen = smallest_hashes(np.stack(images)[order], 5_000)
    assert set(order[chosen].tolist()) == set(range(5_000))


def test_cifar10_is_read_as_torchvision_keeps_it(tmp_path, monkeypatch):
    rng, sums = np.random.default_rng(0), {}
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    raw = {name: rng.integers(0, 256, (8, 3072), dtype=np.uint8) for name, _ in CIFAR10.train_list + CIFAR10.test_list}
    for name, data in raw.items():
        write(name, {"data": data, "labels": (data[:, 0] % 10).tolist()})
    write("batches.meta", {"label_names": list("abcdefghij")})
    for listing in ("train_list", "test_list"):  # the sums of these files instead of the published ones
        monkeypatch.setattr(CIFAR10, listing, [[name, sums[name]] for name, _ in getattr(CIFAR10, listing)])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    monkeypatch.setattr(sources, "CIFAR10_VALIDATION", 10)

    source = open_source("cifar10", root=str(tmp_path))
    assert {split: len(records) for split, records in source.splits.items()} == {"train": 30, "val": 10, "test": 8}
    assert source.classes == tuple("abcdefghij")
    planes = np.concatenate([raw[name] for name, _ in CIFAR10.train_list]).reshape(-1, 3, 32, 32)
    hashes = [hashlib.sha256(image.transpose(1, 2, 0).tobytes()).digest() for image in planes]
    assert max(hashes[int(r.key)] for r in source.splits["val"]) < min(
        hashes[int(r.key)] for r in source.splits["train"]
    )
    for record in source.splits["train"] + source.splits["val"]:
        assert np.array_equal(decode_rgb(source.read(record)), planes[int(record.key)])
        assert record.label == planes[int(record.key)][0, 0, 0] % 10
    for record in source.splits["test"]:
        assert np.array_equal(decode_rgb(source.read(record)).reshape(-1), raw["test_batch"][int(record.key)])


def test_cifar10_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(DataError, match="no network") as caught:
        open_source("cifar10", root=str(tmp_path))
    assert "--root" in caught.value.remedy
    with pytest.raises(DataError, match="devkit"):
        open_source("imagenet", root=str(tmp_path))


def test_digits_are_the_scans_enlarged():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    scans, source = load_digits(), open_source("digits")
    assert {split: len(records) for split, records in source.splits.items()} == {"train": 1000, "val": 797}
    assert len({record.key for records in source.splits.values() for record in records}) == 1797
    for record in source.splits["val"][:20]:
        image = decode_rgb(source.read(record))
        assert image.shape == (3, 32, 32) and (image[0] == image[1]).all()
        assert record.label == scans.target[int(record.key)]
        coarse = image[0].reshape(8, 4, 8, 4).float().mean((1, 3)).numpy()
        assert np.corrcoef(coarse.ravel(), scans.images[int(record.key)].ravel())[0, 1] > 0.97


def test_class_folders_flat_folders_and_splits(tmp_path):
    classes = touch(tmp_path / "a", "dog/1.jpg", "cat/1.JPEG", "cat/deep/2.png", "cat/notes.txt", "cat/.hidden.jpg")
    source = open_folder(classes)
    assert source.classes == ("cat", "dog")
    assert listed(source) == {
        "cat/1.JPEG": ("cat_1", 0),
        "cat/deep/2.png": ("cat_deep_2", 0),
        "dog/1.jpg": ("dog_1", 1),
    }

    flat = open_folder(touch(tmp_path / "b", "x.webp", "y.tiff"))
    assert flat.classes == () and listed(flat) == {"x.webp": ("x", -1), "y.tiff": ("y", -1)}

    split = open_folder(touch(tmp_path / "c", "train/dog/1.jpg", "train/cat/1.jpg", "val/dog/1.jpg", "test/9.jpg"))
    assert split.classes == ("cat", "dog") and set(split.splits) == {"train", "val", "test"}
    assert listed(split, "val") == {"val/dog/1.jpg": ("dog_1", 1)} and listed(split, "test") == {
        "test/9.jpg": ("9", -1)
    }


def test_keys_are_safe_unique_and_keep_imagenets_names(tmp_path):
    paths = ["n01/n01_7.JPEG", "n01/a.jpg", "n01/a.png", "n01/ü b.c.jpg", "n01/" + "x" * 200 + ".jpg", "n/01_a.jpg"]
    keys = {origin: key for origin, (key, _) in listed(open_folder(touch(tmp_path, *paths))).items()}
    assert keys["n01/n01_7.JPEG"] == "n01_7" and keys["n01/ü b.c.jpg"] == "n01___b_c" and keys["n/01_a.jpg"] == "n_01_a"
    assert len(set(keys.values())) == len(paths)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,95}", key) for key in keys.values())


def test_a_held_out_share_does_not_move_when_files_are_added(tmp_path):
    touch(tmp_path, *(f"{'ab'[i % 2]}/{i}.jpg" for i in range(50)))
    before = open_folder(tmp_path, val_fraction=0.2)
    assert len(before.splits["val"]) == 10 and len(before.splits["train"]) == 40
    touch(tmp_path, "a/new.jpg")
    after = open_folder(tmp_path, val_fraction=0.2)
    assert len(set(listed(before, "val")) ^ set(listed(after, "val"))) <= 2


def test_folders_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        open_folder(touch(tmp_path / "a", "x.txt"))
    with pytest.raises(DataError, match=r"1 images lie beside the class folders, first 'y\.jpg'"):
        open_folder(touch(tmp_path / "b", "x/x.jpg", "y.jpg"))
    with pytest.raises(DataError, match="the class 'cow', which is missing from train"):
        open_folder(touch(tmp_path / "c", "train/x/1.jpg", "val/cow/1.jpg"))
    with pytest.raises(ConfigError, match="holds train, a split, beside extra, which is none"):
        open_folder(touch(tmp_path / "d", "train/x/1.jpg", "extra/x/1.jpg"))
    with pytest.raises(ConfigError, match="val and validation: two mean one split"):
        open_folder(touch(tmp_path / "e", "train/x/1.jpg", "val/x/1.jpg", "validation/x/1.jpg"))


def test_a_split_goes_by_its_usual_names_and_may_stand_alone(tmp_path):
    alone = open_folder(touch(tmp_path, "validation/dog/1.jpg", "validation/cat/1.jpg"))
    assert alone.splits.keys() == {"val"} and alone.classes == ("cat", "dog")


@pytest.mark.parametrize(
    "options", [{"root": "x"}, {"val_fraction": 1.0}, {"val_fraction": float("nan")}, {"val_fraction": -0.1},
                {"source": "nowhere"}, {"source": "digits", "val_fraction": 0.1}, {"source": "digits", "root": "x"},
                {"source": "imagenet"}],
)  # fmt: skip
def test_options_without_meaning_are_refused(tmp_path, options):
    touch(tmp_path, "x/1.jpg", "x/2.jpg")
    options = {"source": str(tmp_path)} | options
    with pytest.raises(ConfigError):
        open_source(options.pop("source"), **options)


def test_read_returns_the_files_own_bytes(tmp_path):
    data = encode(Image.new("RGB", (4, 4)), "JPEG")
    touch(tmp_path, "train/x/1.jpg")
    (tmp_path / "train/x/1.jpg").write_bytes(data)
    source = open_folder(tmp_path)
    assert source.read(source.splits["train"][0]) == data
