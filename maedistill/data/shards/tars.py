"""Walk a tar strictly: find where each regular member's bytes lie, or raise a `DataError` that says what is wrong.

Training libraries read tars as streams and accept whatever they get: a shard that was cut at a member boundary, or
whose header was overwritten, ends early and silently, and the run continues with fewer images. This module checks
every header's checksum and requires the two zero blocks at the archive's end, so a damaged shard is rejected. It reads
only headers and never extracts anything.

    shard.tar -> walk_tar -> name, offset, size of each file, in archive order
"""

import os
import re
from collections.abc import Iterator
from tarfile import AREGTYPE, DIRTYPE, GNUTYPE_LONGNAME, REGTYPE, XGLTYPE, XHDTYPE, HeaderError, TarInfo
from typing import BinaryIO

from maedistill.errors import DataError

BLOCK = 512  # bytes: tar headers are one block, data is padded to whole blocks
LARGEST_EXTENSION = 1 << 20  # bytes of a long name or pax header; real ones have a few hundred
LONGEST_NAME = 1024  # characters; systems allow 255 for a file name and some thousands for a path
_SURELY_IN_HEADER = 90  # characters of a name without its suffix; a header has room for 100
READ = 1 << 20  # bytes per read while the padding after the archive's end is checked

REGULAR, EXTENSIONS = (REGTYPE, AREGTYPE), (XHDTYPE, XGLTYPE, GNUTYPE_LONGNAME)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_PAX_LENGTH, _PAX_SIZE = re.compile(rb"([0-9]{1,7}) "), re.compile(rb"[0-9]{1,19}")  # int() refuses 4,300 digits


def walk_tar(file: BinaryIO, path: str) -> Iterator[tuple[str, int, int]]:
    """Yield each regular member's name, offset in the archive and size in bytes. `path` names the tar in errors.

    Raise `DataError`, possibly after some members, if the file is not a tar, is compressed, cut or damaged, or holds
    links, devices or names that lead out of the archive. Use the members only after the walk has ended.
    """
    descriptor, end = file.fileno(), os.fstat(file.fileno()).st_size
    position, kind = 0, b""
    extended: tuple[str | None, int | None] | None = None  # name and size for the next member
    while (header := os.pread(descriptor, BLOCK, position)).count(0) != BLOCK:
        name, size, kind = _parse_header(path, header, position)
        if extended and kind in REGULAR:
            size = size if extended[1] is None else extended[1]
        data, position = position + BLOCK, position + BLOCK + -(-size // BLOCK) * BLOCK
        if position > end:
            raise _damaged(path, f"is cut inside {name!r}, {position - end} bytes are missing")
        if kind in EXTENSIONS:
            if size > LARGEST_EXTENSION or (extended and kind != XGLTYPE):
                raise _damaged(path, f"has an extended header of {size} bytes, or two, at byte {data - BLOCK}")
            attributes = _parse_extension(path, kind, os.pread(descriptor, size, data))
            extended = extended if kind == XGLTYPE else attributes
            continue
        name, extended = extended[0] or name if extended else name, None
        if len(name) > LONGEST_NAME:
            raise _damaged(path, f"has a member whose name is {len(name):,} letters long, beginning {name[:40]!r}")
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError(
                f"{path}: the member name {name!r} leads out of the archive",
                "do not use this shard: it is broken, or made to overwrite files where it is extracted",
            )
        if kind == DIRTYPE and size:  # readers disagree on whether data follows
            raise _damaged(path, f"gives the folder {name!r} a size of {size} bytes")
        if kind in REGULAR and not name.endswith("/"):
            yield name, data, size
        elif kind not in (*REGULAR, DIRTYPE):
            raise DataError(
                f"{path}: {name!r} is a link, a device or a sparse file (tar type {kind.decode('latin-1')!r})",
                "write the shard again with plain files only, e.g. with maedistill shards",
            )
    if kind in EXTENSIONS:
        raise _damaged(path, "ends after an extended header, whose member is missing")
    if end - position < 2 * BLOCK:
        raise _damaged(path, "is cut inside the archive's end mark")
    while chunk := os.pread(descriptor, READ, position):
        if chunk.count(0) != len(chunk):
            raise _damaged(path, f"has data after the archive's end mark, after byte {position}")
        position += len(chunk)


def is_header_of(header: bytes, key: str) -> bool:
    """Return whether a 512-byte block may be the header of the file after it: whether it names `key` with a suffix.

    Return True for long or non-ASCII names, which a header may not hold in full.
    """
    if len(key) > _SURELY_IN_HEADER or not key.isascii():
        return True
    return len(header) == BLOCK and _name(header).startswith(f"{key}.")


def _parse_header(path: str, header: bytes, position: int) -> tuple[str, int, bytes]:
    """Return the name, size in bytes and type flag of one 512-byte header."""
    if position == 0 and header.startswith(_COMPRESSED):
        raise DataError(f"{path} is compressed: images are read in place, which needs a plain tar", "decompress it")
    if len(header) < BLOCK:
        at = "inside a header" if header else "at a member boundary"
        raise _damaged(path, f"is cut {at}: the archive's end mark is missing at byte {position}")
    try:
        member = TarInfo.frombuf(header, "utf-8", "backslashreplace")
    except HeaderError as error:  # the checksum, or a field that is no number
        raise _damaged(path, f"has a damaged header at byte {position}" if position else "is not a tar") from error
    if member.size < 0:
        raise _damaged(path, f"has a header without a size at byte {position}")
    return _name(header), member.size, member.type


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name)


def _parse_extension(path: str, kind: bytes, data: bytes) -> tuple[str | None, int | None]:
    """Return the name and size that an extended header sets for the next member; None for each that it does not set."""
    name, size, start = None, None, 0
    if kind == GNUTYPE_LONGNAME:
        name, data = _text(data), b""
    while start < len(data):  # one pax record after the other
        match = _PAX_LENGTH.match(data, start)
        end = start + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data):
            raise _damaged(path, "has a damaged extended header")
        key, _, value = data[match.end() : end - 1].partition(b"=")
        start = end
        if key.startswith(b"GNU.sparse"):
            raise _damaged(path, "holds a sparse file")
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            if not _PAX_SIZE.fullmatch(value):
                raise _damaged(path, f"has an extended header with the size {value[:40]!r}")
            size = int(value)
    if name == "":
        raise _damaged(path, "has an extended header with an empty name")
    if kind == XGLTYPE and (name, size) != (None, None):
        raise _damaged(path, "sets one name or size for all members")
    return name, size


def _text(raw: bytes) -> str:
    """Decode a member name. Invalid UTF-8 is escaped, so that different names stay different."""
    return raw.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _damaged(path: str, damage: str) -> DataError:
    return DataError(f"{path} {damage}", "copy or write this shard again")
