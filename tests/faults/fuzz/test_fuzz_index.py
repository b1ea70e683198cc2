"""Indexes: damaged bytes, headers and JSON text that lie, arrays with any numbers; and class names beside the shards.

An index that is taken must be usable: every sample has a key, a shard, and bytes that can be read.
"""

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from maedistill.data.shards.index import SCANNED, index_of, load_index, save_index, select_shards
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.scan import scan_shard
from maedistill.errors import DataError
from tests.faults.fuzz.damage import NASTY, byte_edits, cases, edited, packed, regrown, tree_edits, unpacked

REFUSALS = (DataError,)
FILE = Path("train.index.safetensors")
CLASSES = Path("classes.json")


def shard(number: int) -> bytes:
    """Two labelled images and one without a label."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in {
            "a.jpg": b"j" * 600,
            "a.cls": b"1",
            "é.png": b"p" * number,
            "é.cls": b"0",
            "c.webp": b"",
        }.items():
            info = tarfile.TarInfo(f"{number}{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


SHARDS = {f"train-{number:06d}.tar": shard(number) for number in range(3)}


def good_index() -> bytes:
    """What one scan of these shards writes."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in SHARDS.items():
            (Path(folder) / name).write_bytes(data)
        scans = [scan_shard(f"{folder}/{name}") for name in SHARDS]
        save_index(index_of(list(SHARDS), scans, classes=(), provenance=SCANNED), Path(folder) / FILE)
        return (Path(folder) / FILE).read_bytes()


GOOD = good_index()
HEADER, BODY = unpacked(GOOD)
TEXT, ARRAYS = json.loads(HEADER["__metadata__"]["index"]), load(GOOD)


def check(case: tuple[bytes, bytes | None]) -> None:
    """The index and, where given, the classes beside shards that are whole; an index of b"" is made anew."""
    data, classes = case
    for name, content in SHARDS.items():
        if not Path(name).is_file():
            Path(name).write_bytes(content)
    FILE.write_bytes(data) if data else FILE.unlink(missing_ok=True)
    CLASSES.write_bytes(classes) if classes is not None else CLASSES.unlink(missing_ok=True)
    if data:
        use(select_shards(known := load_index(FILE), known.shards))
    for pattern in ("train-*.tar", "train-{000000,000002}.tar"):
        use(open_index(pattern))


def use(index: Any) -> None:
    """What the rest of the package asks of an index."""
    assert all(type(name) is str and "/" not in name.removeprefix(str(Path.cwd()) + "/") for name in index.shards)
    assert all(type(size) is int and size >= 0 for size in index.shard_bytes)
    assert len(index.shards) == len(index.shard_bytes) == len(index.shard_sha256) == len(index.starts) - 1
    assert all(type(name) is str and name.encode() is not None for name in index.classes)
    for i in range(len(index)):
        number = index.shard_of(i)
        assert index.key(i).encode() is not None and 0 <= number < len(index.shards)
        assert 0 <= index.offsets[i] <= index.offsets[i] + index.sizes[i] <= index.shard_bytes[number]
        assert -1 <= index.labels[i] < index.num_classes <= 10**6
    assert len(index.fingerprint()) == 64


def with_text(text: str) -> bytes:
    """An index whose arrays are good and whose JSON text is this."""
    return save(ARRAYS, {"index": text})


def with_arrays(changes: list[tuple[str, str, int, Any]]) -> bytes:
    """An index whose text is good and whose arrays are changed: another number, type, shape or length."""
    arrays = {name: array.copy() for name, array in ARRAYS.items()}
    for name, kind, position, value in changes:
        array = arrays[name]
        if kind == "set" and array.size and array.dtype != bool:
            array.flat[position % array.size] = np.int64(value).astype(array.dtype)
        elif kind == "add" and array.dtype == np.int64:
            arrays[name] = array + np.int64(value)
        elif kind == "type":
            types = (np.int32, np.uint64, np.float64, np.float32, np.bool_, np.uint8, np.int8)
            arrays[name] = array.astype(types[position % len(types)])
        elif kind == "shape":
            arrays[name] = array.reshape((-1, 1) if position % 2 or array.size != 1 else ())
        elif kind == "length":
            arrays[name] = np.resize(array, position % 12)
    return save(arrays, {"index": json.dumps(TEXT)})


BIG = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 600, 2**31, 2**33, 2**40, 2**62, 2**63 - 1])
CHANGE = st.tuples(
    st.sampled_from(sorted(ARRAYS)), st.sampled_from(["set", "set", "add", "type", "shape", "length"]),
    st.integers(0, 40), st.one_of(BIG, st.integers(-10, 700)),
)  # fmt: skip
DEEP = "[" * 100_000 + "]" * 100_000


def test_what_is_not_damaged_is_taken(sandbox):
    assert sandbox((GOOD, None)) == sandbox((with_arrays([]), b'["a", "b"]')) == "taken"
    assert sandbox((b"", b'["a", "b"]')) == "taken" and sandbox((GOOD, b'["a"]')) == "DataError"  # names are read again


@cases(0.07)
@given(st.lists(CHANGE, min_size=1, max_size=3))
@example([("starts", "set", 3, 2**33)])
@example([("offsets", "set", 0, 2**63 - 1)])
@example([("key_ends", "set", 0, 3)])
@example([("labels", "set", 0, 2**62)])
def test_arrays_with_any_numbers(sandbox, changes):
    sandbox((with_arrays(changes), None))


@cases(0.05)
@given(tree_edits(), byte_edits(1, nasty=(*NASTY, b'"../../etc/passwd"', b'"/etc/passwd"')))
@example([], [("insert", 0, DEEP.encode())])
@example([("replace", [], None)], [])
@example([("replace", [1, 0], "/etc/passwd")], [])
def test_text_of_any_kind(sandbox, grown, edits):
    text = edited(json.dumps(regrown(TEXT, grown)).encode(), edits)
    sandbox((with_text(text.decode("utf-8", "replace")), None))


@cases(0.05)
@given(tree_edits(), byte_edits(2), st.sampled_from([None] * 8 + [0, 1, 2**31, 2**63 - 1, 2**64 - 1]))
def test_headers_that_lie(sandbox, grown, edits, length):
    sandbox((edited(packed(regrown(HEADER, grown), BODY, length=length), edits), None))


@cases(0.03)
@given(
    st.one_of(tree_edits().map(lambda grown: json.dumps(regrown(["a", "b"], grown)).encode()), st.binary()),
    byte_edits(2),
)
@example(DEEP.encode(), [])
@example(b'["\\ud800", "b"]', [])
def test_class_names_of_any_kind(sandbox, names, edits):
    sandbox((b"", edited(names, edits)))
