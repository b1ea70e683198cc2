"""Validate an index before it is used: the file may be damaged or malicious.

    JSON text -> parse_json -> check_text        arrays by name -> check_arrays        both raise `ValueError`

Sizes stated in the file are compared with the actual data before anything is allocated from them.
Letters: `n` samples, `m` shards.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

MOST_CLASSES = 1_000_000  # labels have at most six digits

_KINDS = {"format": int, "shards": list, "shard_bytes": list, "shard_sha256": list, "classes": list, "made": dict}
_OPTIONAL = {"shard_stamps": list, "shard_mtime_ns": list}  # see stamps.py; indexes of earlier versions have none
_SHA256 = re.compile("[0-9a-f]{64}")


def parse_json(data: str | bytes) -> Any:
    """Parse JSON like `json.loads`, but raise `ValueError` for brackets that are nested too deep as well."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


def is_text(value: object) -> bool:
    """Return whether this is a string that can be encoded: JSON may hold lone surrogates such as `"\\ud800"`."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def check_text(text: Any) -> None:
    """Check everything but the arrays: types, bare file names, valid sizes and checksums."""
    _require(
        isinstance(text, dict) and _KINDS.keys() <= text.keys() <= (_KINDS | _OPTIONAL).keys(),
        f"it does not hold {', '.join(_KINDS)}",
    )
    for name in text:
        kind = (_KINDS | _OPTIONAL)[name]
        _require(type(text[name]) is kind, f"{name} is no {kind.__name__}")
    for name, kind in (("shard_stamps", str), ("shard_mtime_ns", int)):
        values = text.get(name, [])
        _require(len(values) in (0, len(text["shards"])), f"{name} are not those of the shards")
        _require(all(type(value) is kind for value in values), f"a value of {name} is no {kind.__name__}")
    shards, sizes, checksums = text["shards"], text["shard_bytes"], text["shard_sha256"]
    _require(len(shards) == len(sizes) == len(checksums), "not every shard has a size and a checksum")
    bare = all(is_text(name) and name not in ("", ".", "..") and not re.search(r"[/\0]", name) for name in shards)
    _require(bare and len(set(shards)) == len(shards), "the shards are not named by distinct bare file names")
    _require(all(type(size) is int and 0 <= size < 2**63 for size in sizes), "a shard has no size")
    _require(all(is_text(sha) and _SHA256.fullmatch(sha) for sha in checksums), "a shard has no checksum")
    _require(all(map(is_text, text["classes"])), "a class has no name")


def check_arrays(arrays: Mapping[str, np.ndarray], text: Mapping[str, Any]) -> None:
    """Check that arrays fit each other and a checked `text`: images lie inside their shards, keys are valid UTF-8."""
    for name, array in arrays.items():
        right = np.dtype(np.uint8 if name == "key_text" else np.int64)
        _require(array.dtype == right and array.ndim == 1, f"{name} is {array.dtype} with {array.ndim} dimensions")
    starts, offsets, sizes, labels = (arrays[name] for name in ("starts", "offsets", "sizes", "labels"))
    n, m = len(offsets), len(text["shards"])
    _require(len(sizes) == len(labels) == len(arrays["key_ends"]) == n, "the arrays have different lengths")
    _require(len(starts) == m + 1 and starts[0] == 0 and starts[-1] == n, "the shards do not cover the samples")
    _require(_rises(starts, n), "the shards overlap")
    ends = np.repeat(np.array(text["shard_bytes"], dtype=np.int64), np.diff(starts))  # [n]
    # offsets + sizes could overflow int64; the difference of two non-negative numbers cannot
    inside = (offsets >= 0) & (sizes >= 0) & (sizes <= ends - offsets)  # [n]
    _require(bool(inside.all()), "an image leads out of its shard")
    most = len(text["classes"]) or MOST_CLASSES
    _require(bool(((labels >= -1) & (labels < most)).all()), f"a label is not below {most:,}")
    letters, ends = arrays["key_text"], arrays["key_ends"]  # [letters], [n]
    _require(_rises(ends, len(letters)) and ends[-1:].sum() == len(letters), "the keys do not cover their text")
    letters.tobytes().decode()  # UnicodeDecodeError is a ValueError
    first = letters[ends[ends < len(letters)]]  # first byte of each key but the first
    _require(bool((first & 0b1100_0000 != 0b1000_0000).all()), "a key begins within a character")


def _rises(numbers: np.ndarray, most: int) -> bool:
    """Return whether numbers never fall and stay within 0 .. most. It compares, because differences could overflow."""
    return bool((numbers >= 0).all() and (numbers <= most).all() and (numbers[1:] >= numbers[:-1]).all())


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
