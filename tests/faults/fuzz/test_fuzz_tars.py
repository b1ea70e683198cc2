"""Tars: damaged ones, and ones made to lie with every checksum right.

What the scan takes, Python's tarfile takes too, and finds the same images in the same places.
"""

import io
import re
import tarfile
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from maedistill.data.shards.scan import IMAGE_SUFFIXES, NO_LABEL, scan_shard
from maedistill.errors import DataError
from tests.faults.fuzz.damage import NASTY, byte_edits, cases, edited

REFUSALS = (DataError,)
BLOCK = 512


def check(data: bytes) -> None:
    """Every row lies in the shard, and is where tarfile finds it."""
    path = Path("train-000000.tar")
    path.write_bytes(data)
    scan = scan_shard(str(path))
    assert scan.num_bytes == len(data)
    assert len(scan.keys) == len(set(scan.keys)) == len(scan.offsets) == len(scan.sizes) == len(scan.labels)
    for key, offset, size, label in zip(scan.keys, scan.offsets, scan.sizes, scan.labels, strict=True):
        assert key.encode() is not None and ".." not in key.split("/") and not key.startswith("/")
        assert offset % BLOCK == 0 and 0 < offset <= offset + size <= len(data) and NO_LABEL <= label < 10**6
    with tarfile.open(path, "r:", encoding="utf-8", errors="backslashreplace") as tar:
        members = [member for member in tar if member.isfile() and not Path(member.name).name.startswith("._")]
    images = [(m.offset_data, m.size) for m in members if m.name.rpartition(".")[2].lower() in IMAGE_SUFFIXES]
    assert sorted(images) == sorted(zip(scan.offsets, scan.sizes, strict=True))


def header(
    name: bytes,
    size: bytes,
    kind: bytes,
    *,
    prefix: bytes = b"",
    magic: bytes = b"ustar\x0000",
    sum_holds: bool = True,
) -> bytes:
    """One block with these raw fields; its checksum is right unless `sum_holds` is false."""
    fields = bytearray(BLOCK)
    fields[0:100] = name[:100].ljust(100, b"\0")
    fields[100:124] = b"0000644\0" * 3
    fields[124:136] = size[:12].ljust(12, b"\0")
    fields[136:148] = b"00000000000\0"
    fields[148:156] = b" " * 8
    fields[156:157] = kind
    fields[257:265] = magic
    fields[345:500] = prefix[:155].ljust(155, b"\0")
    fields[148:156] = b"%06o\0 " % ((sum(fields) + (not sum_holds)) & 0o777777)
    return bytes(fields)


def entry(name: bytes, data: bytes, kind: bytes = b"0", *, size: bytes | None = None, **fields) -> bytes:
    """A header and its data in whole blocks; `size` is what the header says where that is a lie."""
    said = b"%011o\0" % len(data) if size is None else size
    return header(name, said, kind, **fields) + data + bytes(-len(data) % BLOCK)


def record(key: bytes, value: bytes, *, more: int = 0) -> bytes:
    """A pax record; its length is wrong by `more`."""
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length + more, key, value)


def plain() -> bytes:
    """A shard in two dialects, as tarfile writes it."""
    buffer = io.BytesIO()
    for dialect in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(fileobj=buffer, mode="w", format=dialect) as tar:
            for name, data in {"000.jpg": b"j" * 600, "000.cls": b"3", "é" * 90 + ".png": b"p", "ü.webp": b""}.items():
                info = tarfile.TarInfo(f"{dialect}/{name}")
                info.size, info.mtime = len(data), 0.5 if dialect == tarfile.PAX_FORMAT else 0
                tar.addfile(info, io.BytesIO(data))
        buffer.seek(tar.offset - 2 * BLOCK if dialect == tarfile.PAX_FORMAT else 0)
    return buffer.getvalue()


PLAIN = plain()
NAMES = st.one_of(
    st.sampled_from(
        [b"000.jpg", b"000.cls", b"001.PNG", b"a/b.webp", b"._0.jpg", b"/a.jpg", b"../x.jpg", b"a/../b.jpg",
         b"\xff.jpg", b"", b".jpg", b"dir/", b"dir.jpg/", b"x" * 100, b"a\nb.jpg", b"a.pyd", b"C:\\a.jpg", b"a\0b.jpg",
         b"..", b"jpg"]
    ),
    st.binary(max_size=20),
)  # fmt: skip
DATA = st.sampled_from([b"", b"7", b"12\n", b"x" * 512, b"9" * 600, b"1_0", b"-1"])
NUMBERS = st.sampled_from([0, 1, 511, 512, 513, 2**20, 2**20 + 1, 8**11 - 1, 2**33, 2**62, 2**63, 2**64, 2**87])
SIZES = st.one_of(
    st.none(),
    st.none(),
    NUMBERS.map(lambda n: b"%011o\0" % n),
    NUMBERS.map(lambda n: b"\x80" + n.to_bytes(11, "big")),
    st.sampled_from([b"\xff" * 12, b"", b" " * 12, b"-0000000001\0", b"0x1\0", b"zzz", b"1 1\0", b"7" * 12, b"\0001"]),
)
FIELDS = {
    "prefix": st.sampled_from([b"", b"", b"", b"folder", b"..", b"/", b"x" * 155]),
    "magic": st.sampled_from([b"ustar\x0000"] * 4 + [b"ustar  \0", bytes(8), b"star\0\0\0\0"]),
    "sum_holds": st.sampled_from([True] * 15 + [False]),
}
FILES = st.builds(
    entry, NAMES, DATA, st.sampled_from([b"0"] * 8 + [b"\0", b"5", b"1", b"2", b"3", b"6", b"7", b"S", b"K"]),
    size=SIZES, **FIELDS,
)  # fmt: skip
GOOD = st.integers(10, 99).map(lambda i: entry(b"%d.jpg" % i, b"x" * i * 20))
RECORDS = st.one_of(
    st.builds(record, st.just(b"path"), NAMES, more=st.sampled_from([0, 0, 0, 1, -1, 600])),
    st.builds(record, st.just(b"size"), st.one_of(NUMBERS.map(b"%d".__mod__), st.sampled_from(NASTY))),
    st.builds(
        record,
        st.sampled_from([b"mtime", b"linkpath", b"GNU.sparse.major", b"GNU.sparse.name", b"hdrcharset", b"", b"\xff"]),
        st.sampled_from([b"", b"1", b"0.5", b"BINARY", b"nan"]),
    ),
    st.sampled_from(
        [b"", b"9" * 5000, b"5", b"0 ", b"1 x", b"-1 a=b\n", b"3 =", b"99999999999 path=a\n", b"\xb2 path=a\n"]
    ),
)
EXTENSIONS = st.one_of(
    st.builds(
        entry, st.just(b"pax"), st.lists(RECORDS, max_size=4).map(b"".join), st.sampled_from([b"x", b"x", b"g", b"X"])
    ),
    st.builds(
        entry, st.just(b"././@LongLink"), NAMES.map(lambda name: name + b"\0"), st.sampled_from([b"L", b"L", b"K"])
    ),
)
ENDS = st.sampled_from(
    [bytes(1024)] * 15 + [bytes(512), b"", bytes(10240), bytes(1024) + b"x", bytes(512) + b"x" * 512]
)
LONG_DIGITS = b"9" * 5000
MANY_RECORDS = b"4 =\n" * 250_000


def test_what_is_not_damaged_is_taken(sandbox):
    first = entry(b"pax", record(b"path", b"a.jpg"), b"x") + entry(b"x", b"")
    second = entry(b"L", b"c.jpg", b"L") + entry(b"x", b"")
    assert sandbox(PLAIN) == "taken"
    assert sandbox(first + second + entry(b"folder", b"", b"5") + bytes(2 * BLOCK)) == "taken"


@cases(0.08)
@given(edits=byte_edits())
def test_damaged_tars_are_refused_or_whole(sandbox, edits):
    sandbox(edited(PLAIN, edits))


@cases(0.12)
@given(st.lists(st.one_of(GOOD, GOOD, FILES, EXTENSIONS), max_size=6), ENDS, st.one_of(st.just([]), byte_edits(1)))
@example([entry(b"pax", record(b"size", LONG_DIGITS), b"x"), entry(b"a.jpg", b"")], bytes(1024), [])
@example([entry(b"pax", LONG_DIGITS, b"x"), entry(b"a.jpg", b"")], bytes(1024), [])
@example([entry(b"pax", MANY_RECORDS, b"x"), entry(b"a.jpg", b"")] * 4, bytes(1024), [])
@example([entry(b"L", b"n" * 900_000, b"L"), entry(b"a.jpg", b"", b"2")], bytes(1024), [])
def test_lying_tars_are_refused_or_whole(sandbox, entries, end, edits):
    data = b"".join(entries) + end
    sandbox(edited(data, edits) if edits and not re.search(b"9{400}", data) else data)
