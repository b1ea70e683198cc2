"""Scanning and opening shards: found by tarfile and by us alike, damaged ones refused, patterns, subsets, the cache."""

import dataclasses
import io
import os
import pickle
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maedistill.data.index import load_index, open_index, save_index
from maedistill.data.patterns import expand_braces, find_shards, split_name
from maedistill.data.reader import MOST_OPEN, ShardReader
from maedistill.data.scan import scan_shard
from maedistill.errors import ConfigError, DataError

SAMPLES = {"000.jpg": b"a" * 700, "000.cls": b"3", "001.cls": b"12", "001.png": b"b" * 512, "002.webp": b"c"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "maedistill" / "index"


def write_tar(path: Path, members, tar_format=tarfile.USTAR_FORMAT, **attributes):
    """A tar written by Python's own module; a member's value is its bytes or, as a text, its tar type."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            for key, value in attributes.items():
                setattr(info, key, value)
            if isinstance(data, str):
                info.type, data = data.encode(), b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_split(folder: Path, shards=3, samples=4, name="train"):
    for shard in range(shards):
        members = {}
        for i in range(samples):
            members[f"{shard}_{i}.jpg"] = f"image {shard} {i}".encode() * (i + 1)
            members[f"{shard}_{i}.cls"] = str(shard).encode()
        write_tar(folder / f"{name}-{shard:06d}.tar", members)
    return str(folder / f"{name}-*.tar")


def test_scan_finds_what_is_there(tmp_path):
    scan = scan_shard(str(write_tar(tmp_path / "a.tar", SAMPLES)))
    assert (scan.keys, scan.labels, scan.sizes) == (["000", "001", "002"], [3, 12, -1], [700, 512, 1])
    whole = (tmp_path / "a.tar").read_bytes()
    for key, offset, size in zip(scan.keys, scan.offsets, scan.sizes, strict=True):
        assert whole[offset : offset + size] in [SAMPLES.get(f"{key}.{s}") for s in ("jpg", "png", "webp")]


def test_samples_group_by_key_wherever_their_members_lie(tmp_path):
    images = [(f"n01/a.b{i}.JPEG", bytes([i])) for i in range(5)]
    labels = [(f"n01/a.b{i}.cls", b"%d\n" % i) for i in reversed(range(5))]
    scan = scan_shard(str(write_tar(tmp_path / "a.tar", images + labels)))
    assert scan.keys == [f"n01/a.b{i}" for i in range(5)] and scan.labels == list(range(5))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1700000000.25])  # a fraction makes tarfile write a pax header for each member
def test_every_tar_dialect_is_read_as_tarfile_reads_it(tmp_path, tar_format, mtime):
    members = {
        "folder": "5",
        "folder/" + "k" * 90 + ".jpg": b"1" * 600,
        "short.png": b"2",
        "short.cls": b"5",
    }
    if tar_format != tarfile.USTAR_FORMAT:
        members |= {"é" * 120 + ".webp": b"3", "x" * 300 + "/y.jpg": b"4" * 513}
    path = write_tar(tmp_path / "a.tar", members, tar_format, mtime=int(mtime) if tar_format == 0 else mtime)
    with tarfile.open(path) as tar:
        expected = {m.name: (m.offset_data, m.size) for m in tar if m.isfile() and not m.name.endswith(".cls")}
    scan = scan_shard(str(path))
    found = {key: rest for key, *rest in zip(scan.keys, scan.offsets, scan.sizes, strict=True)}
    assert found == {name.rpartition(".")[0]: list(place) for name, place in expected.items()}


def test_foreign_members_are_counted_and_never_opened(tmp_path):
    foreign = {"000.json": b"{", "000.pyd": b"cos\nsystem\n(S'exit 1'\ntR.", "._000.jpg": b"finder", "README": b"hi"}
    scan = scan_shard(str(write_tar(tmp_path / "a.tar", SAMPLES | foreign)))
    assert len(scan.keys) == 3 and scan.ignored == {".json": 1, ".pyd": 1, ".jpg": 1, "README": 1}


@pytest.mark.parametrize("text", [b"", b"-1", b"1_0", "１２".encode(), b"1.0", b"1234567", b"7\n\n", b"7" * 20])
def test_labels_are_plain_numbers(tmp_path, text):
    with pytest.raises(DataError, match=r"'a\.cls' holds .* not a class id"):
        scan_shard(str(write_tar(tmp_path / "a.tar", {"a.jpg": b"1", "a.cls": text})))


def patch(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


# headers in the tar of SAMPLES: 000.jpg at 0, 000.cls 1536, 001.cls 2560, 001.png 3584, 002.webp 4608; end mark at 5632
DAMAGES = {
    "empty": lambda d: b"",
    "no tar": lambda d: b"hello" * 300,
    "gzip": lambda d: b"\x1f\x8b" + d,
    "cut in a header": lambda d: d[:1700],
    "cut in data": lambda d: d[:1000],
    "cut at a member boundary": lambda d: d[:3584],
    "cut before the end mark": lambda d: d[:5632],
    "one zero block of two": lambda d: d[:6144],
    "header of noise": lambda d: patch(d, 1536, bytes(range(1, 255)) * 2),
    "one bit of a name": lambda d: patch(d, 1537, b"1"),
    "size is no number": lambda d: patch(d, 124, b"zzzzzzzzzzz"),
    "header zeroed": lambda d: patch(d, 1536, bytes(512)),
    "two headers zeroed": lambda d: patch(d, 1536, bytes(1024)),
    "data behind the end": lambda d: d + b"x",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tars_are_refused_by_name(tmp_path, damage):
    path = write_tar(tmp_path / "train-000000.tar", SAMPLES)
    assert path.read_bytes()[5632:] == bytes(path.stat().st_size - 5632)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(DataError, match=r"train-000000\.tar"):
        open_index(str(path))


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("a.jpg", b"1"), ("b.jpg", b"1"), ("a.jpg", b"2")], "'a' occurs twice"),
        ([("a.jpg", b"1"), ("a.png", b"2")], "'a' occurs twice"),
        ([("a.jpg", b"1"), ("a.cls", b"1"), ("a.cls", b"1")], "'a' occurs twice"),
        ([("a.cls", b"1"), ("b.jpg", b"1")], "'a' has a label but no image"),
        ([("a.jpg", "2")], "link"),
        ([("a.jpg", "1")], "link"),
        ([("a.jpg", "3")], "link"),
        ([("/etc/a.jpg", b"1")], "leads out"),
        ([("x/../../a.jpg", b"1")], "leads out"),
    ],
)
def test_shards_that_make_no_sense_are_refused(tmp_path, members, match):
    with pytest.raises(DataError, match=match):
        scan_shard(str(write_tar(tmp_path / "a.tar", members)))


def pax(*records: bytes) -> bytes:
    """A pax header block by block; `tarfile` would not write these records."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, sum(map(len, records))
    return info.tobuf(tarfile.USTAR_FORMAT) + b"".join(records) + bytes(-info.size % 512)


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ([b"5011 size=" + b"9" * 5000 + b"\n"], "with the size b'9999"),  # int() refuses so many digits
        ([b"9" * 5000 + b" a=b\n"], "damaged extended header"),
        ([b"4 =\n"] * 250_000, "ends behind an extended header"),  # was quadratic: a minute for a megabyte
        ([b"8 path=\n"], "an empty name"),
    ],
)
def test_extended_headers_that_lie_are_refused_at_once(tmp_path, records, match):
    (tmp_path / "a.tar").write_bytes(pax(*records) + bytes(1024))
    start = time.process_time()
    with pytest.raises(DataError, match=match) as caught:
        scan_shard(str(tmp_path / "a.tar"))
    assert time.process_time() - start < 5 and len(caught.value.cause) < 1000


def test_what_readers_of_tars_disagree_about_is_refused(tmp_path):
    folder = tarfile.TarInfo("folder")
    folder.type, folder.size = tarfile.DIRTYPE, 512  # with or without a block of data behind it
    images = write_tar(tmp_path / "a.tar", SAMPLES).read_bytes()
    stacked = pax(b"14 path=a.jpg\n", b"") * 2
    for start, match in (
        (folder.tobuf(), "gives the folder 'folder/' a size"),
        (stacked, "extended header of 14 bytes"),
    ):
        (tmp_path / "b.tar").write_bytes(start + images)
        with pytest.raises(DataError, match=match):
            scan_shard(str(tmp_path / "b.tar"))


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
    save_index(dataclasses.replace(open_index(str(tmp_path / "train-00000[01].tar")), made={"made_by": "x"}), file)
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


def test_a_shard_of_another_size_and_a_damaged_index_are_named(tmp_path):
    pattern = write_split(tmp_path)
    open_index(pattern)
    with open(tmp_path / "train-000001.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"train-000001\.tar has .* bytes") as caught:
        open_index(pattern)
    assert "train.index.safetensors" in caught.value.remedy
    index = tmp_path / "train.index.safetensors"
    for wrong in (b"", index.read_bytes()[:-8], index.read_bytes().replace(b'format\\": 1', b'format\\": 9')):
        index.write_bytes(wrong)
        with pytest.raises(DataError, match="no index of format 1"):
            open_index(pattern)


LIES = {
    "sizes too large": lambda i: {"sizes": i.sizes + 100_000},
    "offsets before the shard": lambda i: {"offsets": i.offsets - 2**40},
    "offset + size wraps around": lambda i: {"offsets": i.offsets + 2**62, "sizes": i.sizes + 2**62},
    "samples that are not there": lambda i: {"starts": np.array([0, 4, 8, 2**33])},
    "shards that overlap": lambda i: {"starts": np.array([0, 8, 4, 12])},
    "labels without a class": lambda i: {"labels": i.labels + 2**62},
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
    with pytest.raises(DataError, match="no index"):
        load_index(tmp_path / "train.index.safetensors")


def test_an_index_may_not_name_files_elsewhere(tmp_path):
    pattern = write_split(tmp_path)
    open_index(pattern)
    file = tmp_path / "train.index.safetensors"
    for name in (b"/tmp/n-00001.tar", b"../ain-00001.tar"):  # as long as the name that it takes the place of
        file.write_bytes(file.read_bytes().replace(b"train-000001.tar", name))
        with pytest.raises(DataError, match="distinct bare file names"):
            open_index(pattern)
        file.unlink()
        open_index(pattern)


def test_json_of_any_depth_is_an_error_of_ours(tmp_path):
    pattern = write_split(tmp_path)
    (tmp_path / "classes.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="not JSON"):
        open_index(pattern)


def test_missing_labels_and_nameless_classes_are_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", SAMPLES)
    with pytest.raises(DataError, match="1 of 3 samples have no label, first '002'"):
        open_index(str(path)).require_labels()
    (tmp_path / "a.index.safetensors").unlink()
    (tmp_path / "classes.json").write_text('["only"]')
    with pytest.raises(DataError, match="'001' has the label 12"):
        open_index(str(path))


def test_missing_shards_are_named(tmp_path):
    write_split(tmp_path)
    with pytest.raises(DataError, match=r"7 of 10 shards are missing: .*000003.*000007\.tar and 2 more"):
        find_shards(str(tmp_path / "train-{000000..000009}.tar"))


@pytest.mark.parametrize(
    "pattern",
    ["pipe:cat x.tar", "file:a.tar", "a-{0..9", "a-{x}.tar",
     "a-{9..0}.tar", "a-{00..100}.tar", "a-{0..9999999}.tar",
     "{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}", "{0..1}/a", ".",
     "{a,b}" * 20_000, "{0.." + "9" * 5000 + "}", "a\0*.tar", "a\n.tar", "\udcff.tar", "x" * 5000],
)  # fmt: skip
def test_patterns_that_cannot_be_meant_are_refused(pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in "01":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").touch()
    with pytest.raises(ConfigError):
        find_shards(pattern)


@given(first=st.integers(0, 999), count=st.integers(1, 30), width=st.integers(1, 6))
def test_brace_ranges_count_as_written(first, count, width):
    last = first + count - 1
    width = max(width, len(str(last)))
    names = expand_braces(f"a-{{{first:0{width}d}..{last:0{width}d}}}.tar")
    assert names == [f"a-{number:0{width}d}.tar" for number in range(first, last + 1)]
    assert split_name(tuple(names)) == "a"
    assert len(expand_braces(f"{{x,y,z}}{{{first}..{last}}}")) == 3 * count


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # torch's threads, in a full test run
def test_reader_survives_pickling_and_more_shards_than_it_holds_open(tmp_path):
    index = open_index(write_split(tmp_path, shards=MOST_OPEN + 6, samples=1))
    reader = ShardReader(index)
    open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for _ in range(2):
        for i in range(len(index)):
            assert reader.read(i) == f"image {i} 0".encode()
    if open_before is not None:
        assert len(os.listdir("/proc/self/fd")) - open_before <= MOST_OPEN
    assert pickle.loads(pickle.dumps(reader)).read(3) == reader.read(3)
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
        assert reader.read(5) == b"image 5 0"
    else:
        os._exit(0 if reader.read(4) == b"image 4 0" else 1)


@pytest.mark.parametrize("name", ["sample", "folder/sample", "a-name-of-many-letters" * 5, "échantillon"])
def test_reader_notices_a_shard_that_became_another_of_its_size(tmp_path, name):
    """Labels come from the index: the samples of another shard would be learned with them."""
    for shard in range(2):
        members = {f"{name}-{shard}{i}.jpg": b"x" * 100 for i in range(3)}
        write_tar(tmp_path / f"train-{shard}.tar", members, tarfile.PAX_FORMAT)
    index = open_index(str(tmp_path / "train-*.tar"))
    assert [ShardReader(index).read(i) for i in range(6)] == 6 * [b"x" * 100]
    shutil.copy(index.shards[0], index.shards[1])
    if len(name) > 90 or not name.isascii():  # such names stand elsewhere, and are taken on trust
        assert ShardReader(index).read(4) == b"x" * 100
        return
    with pytest.raises(DataError, match=r"train-1\.tar holds other samples than its index says"):
        ShardReader(index).read(4)


def test_reader_notices_a_shard_that_changes_or_goes(tmp_path):
    index = open_index(write_split(tmp_path))
    os.truncate(index.shards[1], 600)
    os.remove(index.shards[2])
    for i, match in ((5, "changed its size"), (9, "is gone")):
        with pytest.raises(DataError, match=match):
            ShardReader(index).read(i)
