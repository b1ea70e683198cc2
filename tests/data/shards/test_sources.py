"""What data sets list: splits by hash, CIFAR-10 in torchvision's own format, the digits of scikit-learn."""

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets import CIFAR10

from maedistill.data.images.decode import decode_rgb
from maedistill.data.shards import sources
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.reader import ShardReader
from maedistill.data.shards.sources import open_source, smallest_hashes
from maedistill.errors import ConfigError, DataError
from tests.data.shards.image_folders import fill


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
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'maedistill[demo]'")
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


@pytest.mark.parametrize(
    "options", [{"root": "x"}, {"val_fraction": 1.0}, {"val_fraction": float("nan")}, {"val_fraction": -0.1},
                {"source": "nowhere"}, {"source": "digits", "val_fraction": 0.1}, {"source": "digits", "root": "x"},
                {"source": "imagenet"}],
)  # fmt: skip
def test_options_without_meaning_are_refused(tmp_path, options):
    fill(tmp_path, ["x/1.jpg", "x/2.jpg"])
    options = {"source": str(tmp_path)} | options
    with pytest.raises(ConfigError):
        open_source(options.pop("source"), **options)
