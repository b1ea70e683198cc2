"""Hypothesis strategies for damage: edits of bytes and of JSON trees, and how many cases a fuzzer draws.

MAEDISTILL_FUZZ=N draws about N cases over all fuzzers of this folder, with new seeds each time; without it they are few
and always the same. An edit is plain numbers, so that hypothesis can shrink it: positions count modulo the length.
"""

import copy
import json
import os
import struct
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

DEFAULT = 600
LARGE = st.integers(0, 2**32 - 1)
NASTY = (
    b"", b"\0", b"\xff", b"\0" * 512, b"\xff" * 8, b"-1", b"9" * 5000, b"1e999", b"nan", b"[" * 20_000, b"{" * 20_000,
    b'"', b"\\", b"\r\n", b"\xed\xa0\x80", "\u2028".encode(), b"\x7f\xff\xff\xff\xff\xff\xff\xff", b" " * 5000,
)  # fmt: skip
ODD = (
    None, True, -1, 0, 1, 2, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "../../x", "/etc/passwd", "\0", "\n", "\ud800", "a" * 3000, [], {}, [[]], [None], {"": None},
    [2**40], [0, 0], [-1, -1], [2**62, 4], "F64", "BOOL", "F8_E4M3",
)  # fmt: skip


def cases(share: float) -> settings:
    """Return the settings for a fuzzer that draws this share of all cases."""
    wanted = os.environ.get("MAEDISTILL_FUZZ")
    return settings(
        max_examples=max(1, round(int(wanted or DEFAULT) * share)),
        derandomize=wanted is None,
        database=None,
        deadline=None,  # the sandbox has one
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )


def byte_edits(most: int = 4, *, nasty: tuple[bytes, ...] = NASTY) -> st.SearchStrategy[list[tuple]]:
    """At most so many edits for `edited`."""
    simple = st.tuples(st.sampled_from(["flip", "set", "cut"]), LARGE, st.integers(0, 255))
    spans = st.tuples(st.sampled_from(["delete", "repeat", "move"]), LARGE, st.integers(1, 600), LARGE)
    inserted = st.tuples(st.sampled_from(["insert", "overwrite"]), LARGE, st.sampled_from(nasty))
    return st.lists(st.one_of(simple, simple, spans, inserted), max_size=most)


def edited(data: bytes, edits: list[tuple]) -> bytes:
    """The bytes with those edits."""
    for kind, position, value, *more in edits:
        at = position % (len(data) or 1)
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << value % 8)]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "delete":
            data = data[:at] + data[at + value :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + value] * (more[0] % 40) + data[at:]
        elif kind == "move":
            span, rest = data[at : at + value], data[:at] + data[at + value :]
            to = more[0] % (len(rest) or 1)
            data = rest[:to] + span + rest[to:]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "overwrite":
            data = data[:at] + value + data[at + len(value) :]
    return data


def tree_edits(most: int = 3, *, odd: tuple[Any, ...] = ODD) -> st.SearchStrategy[list[tuple]]:
    """At most so many edits for `regrown`."""
    kinds = st.sampled_from(["replace", "replace", "replace", "delete", "copy", "rename"])
    return st.lists(st.tuples(kinds, st.lists(LARGE, min_size=1, max_size=5), st.sampled_from(odd)), max_size=most)


def regrown(tree: Any, edits: list[tuple]) -> Any:
    """A JSON tree with those edits: a value becomes an odd one, goes, comes twice, or gets another name."""
    root = [copy.deepcopy(tree)]
    for kind, path, value in edits:
        holder, key = root, 0
        for step in path if root else ():
            below = holder[key]
            if not isinstance(below, dict | list) or not below:
                break
            holder, key = below, (list(below) if isinstance(below, dict) else range(len(below)))[step % len(below)]
        if not root:
            return None
        if kind == "delete":
            del holder[key]
        elif kind == "copy" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif kind == "rename" and isinstance(holder, dict):
            holder[str(value)[:50]] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(value)
    return root[0] if root else None


def unpacked(data: bytes) -> tuple[Any, bytes]:
    """Header and body of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def packed(header: Any, body: bytes, *, length: int | None = None) -> bytes:
    """A safetensors file; `length` is what it says of its header where that is a lie."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body
