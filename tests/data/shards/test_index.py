"""Opening shards: an index is made once and kept, subsets, the cache; one that lies is refused."""

import dataclasses
import errno
import os

import numpy as np
import pytest

from maedistill import durable
from maedistill.data.shards.index import index_of, load_index, save_index, why_unscorable
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.reader import ShardReader
from maedistill.data.shards.scan import Members, ShardScan
from maedistill.errors import ConfigError, DataError
from tests.data.tar_files import write_split, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "maedistill" / "index"


def test_open_index_scans_once_then_reads(tmp_path):
    pattern = write_split(tmp_path)
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    first = open_index(pattern)
    assert (tmp_path / "train.index.safetensors").is_file()
    stamp = (tmp_path / "train.index.safetensors").stat().st_mtime_ns
    second = open_index(str(tmp_path / "train-{000000..000002}.tar"))
    assert (tmp_path / "train.index.safetensors").stat().st_mtime_ns == stamp
    for field in dataclasses.fields(first):
        assert np.array_equal(getattr(first, field.name), getattr(second, field.name)), field.name
    assert len(first) == 12 and first.classes == ("a", "b", "c") and first.starts.tolist() == [0, 4, 8, 12]
    assert [first.shard_of(i) for i in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    reader = ShardReader(first)
    for i in range(12):
        shard, row = first.key(i).split("_")
        assert reader.read(i) == f"image {shard} {row}".encode() * (int(row) + 1) and first.labels[i] == int(shard)


def test_a_subset_of_shards_has_the_rows_of_those_shards(tmp_path):
    whole = open_index(write_split(tmp_path))
    part = open_index(str(tmp_path / "train-{000000,000002}.tar"))
    rows = [*range(4), *range(8, 12)]
    assert [part.key(i) for i in range(8)] == [whole.key(i) for i in rows]
    assert np.array_equal(part.offsets, whole.offsets[rows]) and np.array_equal(part.labels, whole.labels[rows])
    assert ShardReader(part).read(7) == ShardReader(whole).read(11)


def test_a_scan_of_some_shards_is_made_again_when_more_are_asked_for(tmp_path):
    pattern = write_split(tmp_path)
    assert len(open_index(str(tmp_path / "train-000001.tar"))) == 4
    assert len(open_index(pattern)) == 12
    assert len(open_index(str(tmp_path / "train-000001.tar"))) == 4


def test_an_index_made_with_the_shards_is_not_extended(tmp_path):
    pattern = write_split(tmp_path)
    file = tmp_path / "train.index.safetensors"
    save_index(
        dataclasses.replace(open_index(str(tmp_path / "train-00000[01].tar")), provenance={"made_by": "x"}), file
    )
    with pytest.raises(DataError, match=r"train-000002\.tar is not in the index"):
        open_index(pattern)


def test_shards_in_a_read_only_folder_are_indexed_in_the_cache(tmp_path, cache):
    pattern = write_split(tmp_path)
    tmp_path.chmod(0o555)
    try:
        first = open_index(pattern)
        assert len(first) == 12 and len(os.listdir(cache)) == 1 and not list(tmp_path.glob("*index*"))
        stamp = next(cache.iterdir()).stat().st_mtime_ns
        assert open_index(pattern).key(11) == first.key(11) and next(cache.iterdir()).stat().st_mtime_ns == stamp
        os.utime(tmp_path / "train-000001.tar", ns=(1, 1))  # changed shards get an index of their own
        open_index(pattern)
        assert len(os.listdir(cache)) == 2
    finally:
        tmp_path.chmod(0o755)


def test_an_index_that_the_folder_refuses_goes_to_the_cache(tmp_path, cache, monkeypatch):
    """A quota, or a network drive whose rights are not what they say."""
    pattern, write = write_split(tmp_path), durable.write_synced

    def refuse(path, data):
        if path.parent == tmp_path:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))
        write(path, data)

    monkeypatch.setattr(durable, "write_synced", refuse)
    assert len(open_index(pattern)) == 12 and len(os.listdir(cache)) == 1 and not list(tmp_path.glob("*index*"))


@pytest.mark.parametrize("moment", ["scan", "check"])
def test_a_shard_that_may_not_be_read_is_exit_3(tmp_path, monkeypatch, moment):
    pattern, opened = write_split(tmp_path), open
    if moment == "check":
        open_index(pattern)

    def refuse(path, *arguments, **keywords):
        if str(path).endswith("train-000001.tar"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError) as caught:
        open_index(pattern)
    assert caught.value.exit_code == 3 and "train-000001.tar" in caught.value.cause


def relabel(path, number, *, like=None):
    """Write a shard again with another label, of the same size; `like`: with the times of that file."""
    members = {}
    for i in range(4):
        members |= {f"1_{i}.jpg": f"image 1 {i}".encode() * (i + 1), f"1_{i}.cls": b"%d" % number}
    stat = path.stat()
    assert write_tar(path, members).stat().st_size == stat.st_size
    if like is not None:
        os.utime(path, ns=(like.stat().st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("same_time", [False, True])
@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_shard_that_is_replaced_by_one_of_its_size_is_scanned_again(tmp_path, same_time, subset, read_only):
    pattern, shard = write_split(tmp_path), tmp_path / "train-000001.tar"
    tmp_path.chmod(0o555 if read_only else 0o755)
    try:
        before = open_index(pattern)
        relabel(shard, 7, like=shard if same_time else None)
        again = open_index(str(shard) if subset else pattern)
        assert again.labels.tolist() == ([7] * 4 if subset else [0] * 4 + [7] * 4 + [2] * 4)
        assert before.fingerprint() != open_index(pattern).fingerprint()
    finally:
        tmp_path.chmod(0o755)


def test_a_shard_of_another_size_is_scanned_again_and_a_cut_one_refused(tmp_path):
    pattern, shard = write_split(tmp_path), tmp_path / "train-000001.tar"
    open_index(pattern)
    write_tar(shard, {f"{i}.jpg": b"x" * 100 for i in range(40)})
    assert len(open_index(pattern)) == 48
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"train-000001\.tar is cut"):
        open_index(pattern)


def test_an_untouched_scan_of_an_earlier_version_is_kept_and_a_touched_one_made_again(tmp_path):
    pattern, file = write_split(tmp_path), tmp_path / "train.index.safetensors"
    save_index(dataclasses.replace(open_index(pattern), shard_stamps=(), shard_mtime_ns=()), file)
    before = file.read_bytes()
    open_index(pattern)
    assert file.read_bytes() == before  # 150 GB are not read again
    relabel(tmp_path / "train-000001.tar", 7)
    later = file.stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "train-000001.tar", ns=(later, later))
    assert open_index(pattern).labels[4] == 7


def test_a_changed_shard_of_an_index_that_cannot_be_made_again_is_an_error(tmp_path):
    pattern, file = write_split(tmp_path), tmp_path / "train.index.safetensors"
    save_index(dataclasses.replace(open_index(pattern), provenance={"made_by": "x"}), file)
    relabel(tmp_path / "train-000001.tar", 7)
    with pytest.raises(DataError, match=r"train-000001\.tar has changed its contents"):
        open_index(pattern)
    moved = file.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"train-000001\.tar has changed its contents"):
        open_index(pattern, index=str(moved))


def test_class_names_are_read_again(tmp_path):
    pattern = write_split(tmp_path)
    assert open_index(pattern).classes == ()
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    assert open_index(pattern).classes == ("a", "b", "c")
    (tmp_path / "classes.json").write_text('["x", "y", "z"]')
    assert open_index(pattern).classes == ("x", "y", "z")
    (tmp_path / "classes.json").write_text('["x"]')
    with pytest.raises(DataError, match=r"'2_0' has the label 2, but classes\.json names 1 classes"):
        open_index(pattern)


def test_names_of_classes_are_the_same_in_each_form_of_unicode(tmp_path):
    indexes = []
    for name, form in (("a", "caf\\u00e9"), ("b", "cafe\\u0301")):
        (tmp_path / name).mkdir()
        pattern = write_split(tmp_path / name)
        (tmp_path / name / "classes.json").write_text(f'["{form}", "b", "c"]')
        indexes.append(open_index(pattern))
    assert indexes[0].classes == indexes[1].classes == ("caf\u00e9", "b", "c")


def test_labels_that_are_none_are_counted_over_all_shards_that_are_scanned(tmp_path, capsys):
    for shard in range(3):
        members = [(f"{shard}{i}.{end}", b"no" if end == "cls" else b"1") for i in range(2) for end in ("jpg", "cls")]
        write_tar(tmp_path / f"train-{shard}.tar", members)
        for again in (False, True):  # the second time from the index, which has nothing to say
            capsys.readouterr()
            index = open_index(str(tmp_path / "train-*.tar"))
            said = [message for message in capsys.readouterr().err.splitlines() if "labels" in message]
            assert [message.split()[1] for message in said] == ([] if again else [str(2 * (shard + 1))])
        assert (index.labels == -1).sum() == len(index) == 2 * (shard + 1)


def test_labels_that_are_needed_say_what_stands_in_their_place(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", {"0.jpg": b"1", "0.cls": b"n01440764", "00.jpg": b"1", "00.cls": b"3"})
    index = open_index(str(tmp_path / "a.tar"))
    assert index.labels.tolist() == [-1, 3]  # pre-training needs none
    with pytest.raises(DataError, match=r"1 of 2 samples have no label, first .*'0\.cls' holds b'n01440764'") as caught:
        index.require_labels()
    assert "data.label_key" in caught.value.remedy
    write_tar(tmp_path / "b.tar", {"0.jpg": b"1", "0.cls": b"1", "1.jpg": b"1", "1.cls": b"2"})
    open_index(str(tmp_path / "b.tar")).require_labels()
    assert "class 0 never occurs" in capsys.readouterr().err


def test_the_members_of_a_sample_are_chosen_and_each_choice_has_an_index(tmp_path):
    members = {}
    for i in range(3):
        members |= {f"{i}.input.jpg": b"x" * (i + 1), f"{i}.target.jpg": b"y" * 9, f"{i}.fine.cls": b"%d" % i,
                    f"{i}.coarse.cls": b"0", f"{i}.json": b"{}"}  # fmt: skip
    path = str(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(DataError, match=r"'0' has 2 images: input\.jpg, target\.jpg") as caught:
        open_index(path)
    assert "data.image_key=input.jpg" in caught.value.remedy
    fine = Members("input.jpg", "fine.cls")
    for _ in range(2):
        assert open_index(path, members=fine).labels.tolist() == [0, 1, 2]
        assert open_index(path, members=Members("target.jpg;input.jpg", "coarse.cls")).sizes.tolist() == [9, 9, 9]
    unchosen = open_index(path, members=Members("input.jpg"))
    with pytest.raises(DataError, match=r"several labels, coarse\.cls, fine\.cls"):
        unchosen.require_labels()
    with pytest.raises(DataError, match=r"no sample has png, they have .*\.input\.jpg"):
        open_index(path, members=Members("png"))


def test_the_members_of_shards_of_make_shards_are_not_chosen(tmp_path):
    pattern = write_split(tmp_path)
    made = dataclasses.replace(open_index(pattern), provenance={"made_by": "make_shards"})
    save_index(made, tmp_path / "train.index.safetensors")
    with pytest.raises(ConfigError):
        open_index(pattern, members=Members("jpg"))


LIES = {
    "sizes too large": lambda i: {"sizes": i.sizes + 100_000},
    "negative sizes": lambda i: {"sizes": -i.sizes},
    "too few sizes": lambda i: {"sizes": i.sizes[:3]},
    "offsets before the shard": lambda i: {"offsets": i.offsets - 2**40},
    "offset + size wraps around": lambda i: {"offsets": i.offsets + 2**62, "sizes": i.sizes + 2**62},
    "samples that are not there": lambda i: {"starts": np.array([0, 4, 8, 2**33])},
    "shards that overlap": lambda i: {"starts": np.array([0, 8, 4, 12])},
    "labels without a class": lambda i: {"labels": i.labels + 2**62},
    "negative labels": lambda i: {"labels": i.labels - 1000},
    "keys that are no UTF-8": lambda i: {"key_text": np.full_like(i.key_text, 255)},
    "keys beyond their text": lambda i: {"key_ends": i.key_ends + 2**40},
    "keys that fall": lambda i: {"key_ends": i.key_ends[::-1].copy()},
    "fractions": lambda i: {"offsets": i.offsets.astype(np.float64)},
    "a table": lambda i: {"labels": i.labels[:, None]},
    "sizes of another kind": lambda i: {"shard_bytes": ("4096", True, None)},
    "no shards": lambda i: {"shards": (), "shard_bytes": (), "shard_sha256": (), "starts": np.array([], np.int64)},
    "half a character": lambda i: {"key_text": np.frombuffer("é".encode() * 18, np.uint8), "key_ends": i.key_ends},
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_refused(tmp_path, lie):
    index = open_index(write_split(tmp_path))
    save_index(dataclasses.replace(index, **LIES[lie](index)), tmp_path / "train.index.safetensors")
    with pytest.raises(DataError, match="not an index"):
        load_index(tmp_path / "train.index.safetensors")


def index_with(labels, classes=()):
    """The index of a shard of so many samples."""
    scan = ShardScan(1, "", [str(i) for i in range(len(labels))], [0] * len(labels), [1] * len(labels), labels)
    return index_of(["a.tar"], [scan], classes=classes, provenance={})


@pytest.mark.parametrize(
    ("train", "val", "why"),
    [
        ([0, 1, 1], [1, 0], None),
        ([0, 1, 1], [1, 2], None),
        ([0, 1], [2, 3], "none of the 2 classes"),
        ([0, -1, -1], [0], "2 of 3 training images have no label"),
        ([0], [0, -1], "1 of 2 validation images have no label"),
    ],
)
def test_why_training_images_cannot_classify_validation_images(train, val, why):
    found = why_unscorable(index_with(train), index_with(val))
    assert found is None if why is None else why in found


def test_names_of_classes_that_differ_are_a_reason():
    train = index_with([0, 1], ("cat", "dog"))
    assert "'cat' in the training images" in why_unscorable(train, index_with([0, 1], ("red bird", "dog")))
    assert why_unscorable(train, index_with([0, 1], ("cat", "dog", "owl"))) is None
    assert why_unscorable(train, index_with([0, 1])) is None
