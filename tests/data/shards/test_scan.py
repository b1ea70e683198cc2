"""Scanning shards: what tarfile finds is found, damaged and lying ones are refused."""

import tarfile
import time

import pytest
from webdataset.tariterators import base_plus_ext

from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.scan import Members, scan_shard
from maedistill.errors import DataError
from tests.data.tar_files import SAMPLES, write_tar


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
    members = {"folder": "5", "folder/" + "k" * 90 + ".jpg": b"1" * 600, "short.png": b"2", "short.cls": b"5"}
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


LABELS = {b"5": 5, b"5\n": 5, b"5\r\n": 5, b" 5 ": 5, b"\xef\xbb\xbf5": 5, b"0005": 5, b"7\n\n": 7, b"999999": 999_999}
NO_LABELS = [b"", b"-1", b"1_0", "１２".encode(), b"1.0", b"1234567", b"n01440764", b"7" * 20, b"7" + b" " * 70, b"1 2"]


@pytest.mark.parametrize("text", [*LABELS, *NO_LABELS])
def test_labels_are_numbers_as_webdataset_reads_them_and_anything_else_is_none(tmp_path, text):
    scan = scan_shard(str(write_tar(tmp_path / "a.tar", {"a.jpg": b"1", "a.cls": text, "b.jpg": b"2"})))
    assert scan.labels == [LABELS.get(text, -1), -1]
    assert list(scan.unread) == ([] if text in LABELS else ["a"])
    if text in LABELS and not text.startswith(b"\xef"):
        assert scan.labels[0] == int(text)


def by_webdataset(path) -> list[tuple[str, set[str]]]:
    """Key and fields of each sample as WebDataset groups them."""
    samples: dict[str, set[str]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, suffix = base_plus_ext(member.name)
            if key is not None:
                samples.setdefault(key, set()).add(suffix.lower())
    return list(samples.items())


TARS = {
    "masks": [f"{i}.{kind}" for i in range(3) for kind in ("jpg", "seg.png", "cls")],
    "masks first": [f"d.1/{i}.{kind}" for i in range(3) for kind in ("depth.png", "seg.png", "JPG", "cls")],
    "input and output": [f"s{i}.{kind}" for i in range(3) for kind in ("input.jpg", "output.cls")],
    "dots": [f"./x/photo{i}.v{i}.final.jpeg" for i in range(3)],
    "hidden": ["a.jpg", ".b.jpg", "x/._a.jpg", "c"],
}
IMAGES = {"masks": "jpg", "masks first": "jpg", "input and output": "input.jpg", "hidden": "jpg"}


@pytest.mark.parametrize("name", TARS)
def test_keys_and_fields_are_webdatasets(tmp_path, name):
    members = {path: str(i % 3).encode() for i, path in enumerate(TARS[name])}
    path = write_tar(tmp_path / "a.tar", members)
    scan, expected = scan_shard(str(path)), by_webdataset(path)
    expected = [(key, fields) for key, fields in expected if not key.endswith("/")]
    assert scan.keys == [key for key, _ in expected]
    with tarfile.open(path) as tar:
        data = {member.offset_data: member.name for member in tar}
    images = [data[offset] for offset in scan.offsets]
    assert all(image.startswith(f"{key}.") for image, key in zip(images, scan.keys, strict=True))
    if name in IMAGES:
        assert all(
            image.lower() == f"{key}.{IMAGES[name]}".lower() for image, key in zip(images, scan.keys, strict=True)
        )
    assert all(
        (label >= 0) == any(field.endswith("cls") for field in f)
        for label, (_, f) in zip(scan.labels, expected, strict=True)
    )
    read = len(images) + sum(label >= 0 for label in scan.labels)
    assert scan.ignored.total() == len(members) - read
    if name == "masks":
        assert scan.ignored == {".seg.png": 3}


def test_images_whose_names_hold_dots_stay_samples_of_their_own(tmp_path):
    frames = {f"frame.{i:04d}.jpg": bytes([i]) for i in range(5)}
    assert len(scan_shard(str(write_tar(tmp_path / "a.tar", frames))).keys) == 5
    views = {f"clip{c}.{i}.jpg": b"1" for c in range(2) for i in range(3)}
    with pytest.raises(DataError, match="the sample 'clip0' has 3 images") as caught:
        scan_shard(str(write_tar(tmp_path / "b.tar", views)))
    assert "data.image_key=0.jpg" in caught.value.remedy
    assert scan_shard(str(tmp_path / "b.tar"), Members("1.jpg")).keys == ["clip0", "clip1"]


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
        ([("a.jpg", b"1"), ("a.png", b"2")], "'a' has 2 images: jpg, png"),
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
        ([b"4 =\n"] * 250_000, "ends after an extended header"),  # was quadratic: a minute for a megabyte
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
