"""A strict walk over a tar: where each regular member's bytes lie, or a `DataError` that says what is wrong with it.

Training libraries read tars as streams and take whatever comes: a shard that was cut at a member boundary or whose
header was overwritten ends early without a word, and the run goes on with fewer images. Here every header's checksum
is tested and the two zero blocks that end an archive must be there, so a shard is whole or refused. Only headers are
read; nothing is ever extracted.

    shard.tar -> walk_tar -> Member(name, offset, size), in archive order
"""

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from maedistill.errors import DataError

BLOCK = 512  # bytes: tar headers are one block, data is padded to whole blocks
LARGEST_EXTENSION = 1 << 20  # bytes of a long name or pax record; real ones have a few hundred
LONGEST_NAME = 1024  # letters; systems allow 255 for a file and some thousands for its path
_SURELY_IN_HEADER = 90  # letters of a name without its suffix; a header has 100
READ = 1 << 20  # bytes read at once while the padding after the archive's end is checked

REGULAR, DIRECTORY, PAX, PAX_GLOBAL, GNU_LONG_NAME = (b"0", b"\0"), b"5", b"x", b"g", b"L"
EXTENSIONS = (PAX, PAX_GLOBAL, GNU_LONG_NAME)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_PAX_LENGTH, _PAX_SIZE = re.compile(rb"([0-9]{1,7}) "), re.compile(rb"[0-9]{1,19}")  # int() refuses 4,300 digits


class Member(NamedTuple):
    """One regular file in a tar: its bytes are `[offset, offset + size)` of the archive."""

    name: str
    offset: int
    size: int


def walk_tar(file: BinaryIO, path: str) -> Iterator[Member]:
    """Yields the regular members of a tar; directories are passed over. `path` is what errors call it.

    Raises `DataError`, possibly after some members: not a tar, compressed, cut, damaged, links, devices, names that
    lead out of the archive. So use what it yields only after it has ended.
    """
    descriptor, end = file.fileno(), os.fstat(file.fileno()).st_size
    position, kind = 0, b""
    extended: tuple[str | None, int | None] | None = None  # name and size for the next member
    while True:
        header = os.pread(descriptor, BLOCK, position)
        if header.count(0) == BLOCK:
            if kind in EXTENSIONS:
                raise _damaged(path, "ends behind an extended header, whose member is missing")
            _check_end(path, descriptor, position, end)
            return
        name, size, kind = _parse_header(path, header, position)
        if extended and kind in REGULAR:
            size = size if extended[1] is None else extended[1]
        data, position = position + BLOCK, position + BLOCK + -(-size // BLOCK) * BLOCK
        if position > end:
            raise _damaged(path, f"is cut inside {name!r}, {position - end} bytes are missing")
        if kind in EXTENSIONS:
            if size > LARGEST_EXTENSION or (extended and kind != PAX_GLOBAL):
                raise _damaged(path, f"has an extended header of {size} bytes, or two, at byte {data - BLOCK}")
            found = _parse_extension(path, kind, os.pread(descriptor, size, data))
            extended = extended if kind == PAX_GLOBAL else found
            continue
        name, extended = extended[0] or name if extended else name, None
        _check_name(path, name)
        if kind == DIRECTORY and size:  # readers disagree whether such data is there
            raise _damaged(path, f"gives the folder {name!r} a size of {size} bytes")
        if kind in REGULAR and not name.endswith("/"):
            yield Member(name, data, size)
        elif kind not in (*REGULAR, DIRECTORY):
            raise DataError(
                f"{path}: {name!r} is a link, a device or a sparse file (tar type {kind.decode('latin-1')!r})",
                "write the shard again with plain files only, e.g. with tools/make_shards.py",
            )


def is_header_of(header: bytes, key: str) -> bool:
    """Whether the 512 bytes in front of a file may be its header: whether they name it `key` and a suffix.

    Names that may not stand there in full, long or not ASCII, are taken on trust.
    """
    if len(key) > _SURELY_IN_HEADER or not key.isascii():
        return True
    return len(header) == BLOCK and _name(header).rpartition(".")[0] == key


def _parse_header(path: str, header: bytes, position: int) -> tuple[str, int, bytes]:
    """Name, size in bytes and type flag of one 512-byte header."""
    if position == 0 and header.startswith(_COMPRESSED):
        raise DataError(f"{path} is compressed: images are read in place, which needs a plain tar", "decompress it")
    if len(header) < BLOCK:
        at = "inside a header" if header else "at a member boundary"
        raise _damaged(path, f"is cut {at}: the archive's end mark is missing at byte {position}")
    checksum = _number(header[148:156])
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise _damaged(path, f"has a damaged header at byte {position}" if position else "is not a tar")
    size = _number(header[124:136])
    if size is None:
        raise _damaged(path, f"has a header without a size at byte {position}")
    return _name(header), size, header[156:157]


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name)


def _number(field: bytes) -> int | None:
    """A header's number: octal text or, for large files, GNU's base 256; None where it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.fullmatch(field)
    return int(match[1] or b"0", 8) if match else None


def _parse_extension(path: str, kind: bytes, data: bytes) -> tuple[str | None, int | None]:
    """The name and size that an extended header sets for the member after it, None for what it leaves alone."""
    name, size = (_text(data), None) if kind == GNU_LONG_NAME else _parse_pax(path, data)
    if name == "":
        raise _damaged(path, "has an extended header with an empty name")
    if kind == PAX_GLOBAL and (name, size) != (None, None):
        raise _damaged(path, "sets one name or size for all members")
    return name, size


def _parse_pax(path: str, records: bytes) -> tuple[str | None, int | None]:
    """The name and size among the records of a pax header; the others do not matter here."""
    name, size, start = None, None, 0
    while start < len(records):
        match = _PAX_LENGTH.match(records, start)
        end = start + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(records):
            raise _damaged(path, "has a damaged extended header")
        key, _, value = records[match.end() : end - 1].partition(b"=")
        start = end
        if key.startswith(b"GNU.sparse"):
            raise _damaged(path, "holds a sparse file")
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            if not _PAX_SIZE.fullmatch(value):
                raise _damaged(path, f"has an extended header with the size {value[:40]!r}")
            size = int(value)
    return name, size


def _check_name(path: str, name: str) -> None:
    """Refuses names that would lead out of a folder if somebody extracted the tar, or that no file can have."""
    if len(name) > LONGEST_NAME:
        raise _damaged(path, f"has a member whose name is {len(name):,} letters long, beginning {name[:40]!r}")
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(
            f"{path}: the member name {name!r} leads out of the archive",
            "do not use this shard: it is broken, or made to overwrite files where it is extracted",
        )


def _check_end(path: str, descriptor: int, position: int, end: int) -> None:
    """The archive ends with two zero blocks, and nothing but zeros follows."""
    if end - position < 2 * BLOCK:
        raise _damaged(path, "is cut inside the archive's end mark")
    while position < end:
        chunk = os.pread(descriptor, READ, position)
        if chunk.count(0) != len(chunk):
            raise _damaged(path, f"has data after the archive's end mark, behind byte {position}")
        position += len(chunk)


def _text(raw: bytes) -> str:
    """A member name; bytes that are not UTF-8 stay distinguishable."""
    return raw.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _damaged(path: str, what: str) -> DataError:
    return DataError(f"{path} {what}", "copy or write this shard again")
