"""Find, scan or read the index of the shards that a user names: the one door to shards.

    open_index("DIR/train-*.tar") -> find_shards -> the index beside them, or in the cache, or a scan -> ShardIndex

An index that no longer says what its shards hold is made again, or refused if it was not made by a scan.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from maedistill.data.remote.download import read_small
from maedistill.data.remote.urls import check_url, is_url
from maedistill.data.remote.user_cache import FOLDER_VARIABLE, make_user_cache, user_cache
from maedistill.data.shards.index import (
    SCANNED,
    SUFFIX,
    ShardIndex,
    check_labels,
    index_of,
    load_index,
    read_classes,
    save_index,
    select_shards,
    write_whole,
)
from maedistill.data.shards.patterns import Split, find_shards, split_name
from maedistill.data.shards.scan import USUAL, Members, scan_shards
from maedistill.data.shards.stamps import mtime_of, stamp_of
from maedistill.errors import ConfigError, DataError
from maedistill.escaping import warn

_ELSEWHERE = f"set {FOLDER_VARIABLE} to a folder that this user can write to"


def open_index(
    shards: str,
    *,
    index: str | None = None,
    split: Split = "train",
    members: Members = USUAL,
    apply_exif: bool = False,
) -> ShardIndex:
    """Return the index of the shards that a pattern matches: one tar, a glob or a brace range, or part of a split.

    split: which shards are meant if a folder is named.
    Read the file `index` if it is given, else the index beside the shards or in the cache; if neither exists, or if
    shards changed since, scan the shards and save the result. Both arguments may be URLs. members: which fields of a
    sample to read. apply_exif: turn photographs upright.
    Raise `ConfigError` for an invalid pattern, and `DataError` for shards that are missing, damaged, or differ from an
    index that is not made again; remote shards are checked on download.
    """
    try:
        return replace(_open_index(shards, index=index, split=split, members=members), apply_exif=apply_exif)
    except BrokenPipeError:  # of the progress bar, whose reader has exited
        raise
    except OSError as error:
        raise DataError(
            f"{error.filename or shards} cannot be read: {error.strerror or error}",
            "check its permissions, and the disk or network drive that it is on",
        ) from error


def _open_index(shards: str, *, index: str | None, split: Split, members: Members) -> ShardIndex:
    paths = find_shards(shards, split=split)
    folder, stem, suffix = os.path.dirname(paths[0]), split_name(paths), _index_suffix(members)
    address = index or os.path.join(folder, stem + suffix)
    beside = _fetch_index(address) if is_url(address) else Path(address)
    if index and not beside.is_file():
        raise DataError(f"the index {index} does not exist", "leave data.index out: the shards are then scanned once")
    cached = user_cache() / "index" / f"{stem}-{_digest_of(paths)}{suffix}"
    if not (index or is_url(folder)) and members != USUAL and not beside.is_file():
        _refuse_choice(Path(folder, stem + SUFFIX))
    files = filter(os.path.isfile, (beside, cached))  # Path.is_file raises in a folder that may not be entered
    current = (_load_current(file, paths, members, index) for file in files)
    stored = next((one for one in current if one is not None), None)
    names = set(stored.shards) if stored else set()
    missing = [path for path in paths if os.path.basename(path) not in names]
    if stored and missing and (index or is_url(folder) or not stored.is_scan):
        raise DataError(
            f"{missing[0]} is not in the index {address} ({len(missing)} such shards)",
            "name only shards of the index, or remove that file: the shards are then scanned once",
        )
    if stored is None or missing:  # a scan of fewer shards is extended
        others = [path for path in (os.path.join(folder, name) for name in names) if os.path.isfile(path)]
        scanned = sorted({*others, *paths})
        stored = _scan_index(scanned, members, folder)
        _save_where_possible(stored, None if is_url(folder) else beside, cached)
    selected = select_shards(stored, paths)
    if not len(selected):
        raise DataError(f"{shards!r} holds no images", "name others, or write shards with maedistill shards")
    if not is_url(folder) or selected.is_scan:
        selected = _with_classes(selected, read_classes(folder))
    return selected


def _scanned(members: Members) -> dict[str, Any]:
    """Return the provenance of a scan: the fields are noted only if they were chosen."""
    keys = {"image_key": members.image, "label_key": members.label}
    return SCANNED | {name: value for name, value in keys.items() if value is not None}


def _index_suffix(members: Members) -> str:
    """Return how the file name of an index ends: in a way of its own for chosen fields."""
    chosen = "" if members == USUAL else "." + hashlib.sha256(repr(tuple(members)).encode()).hexdigest()[:8]
    return chosen + SUFFIX


def _refuse_choice(made: Path) -> None:
    """Raise `ConfigError` if the shards have an index of make_shards, in which there is nothing to choose."""
    if made.is_file() and not load_index(made).is_scan:
        raise ConfigError(
            f"{made} is an index of maedistill shards, whose samples have one image and one label",
            "leave data.image_key and data.label_key out",
        )


def _load_current(file: Path, paths: tuple[str, ...], members: Members, index: str | None) -> ShardIndex | None:
    """Return an index that still says what its shards hold; None for another. Raise `DataError` if that is no scan.

    A scan is made again if a shard of it has another size, time of change or stamp. One of an earlier version, which
    noted no times, is if a shard is younger than it.
    """
    stored = load_index(file)
    row_of = {name: row for row, name in enumerate(stored.shards)}
    local = [(path, row_of[name]) for path in paths if (name := os.path.basename(path)) in row_of and not is_url(path)]
    if stored.is_scan and stored.provenance != _scanned(members):
        raise DataError(
            f"{file} was made with other values of data.image_key and data.label_key",
            "leave data.index out, or choose the same" if index else "remove it: the shards are then scanned once",
        )
    for path, row in local:
        how = _change(path, stored, row, file)
        if how and stored.is_scan and not index:
            warn(f"{path} {how} since it was scanned: the shards are scanned again")
            return None
        if how:
            remedy = "copy the shard again"
            if stored.is_scan:
                remedy += f", or, if it was changed on purpose, remove {file}: the shards are then scanned once"
            raise DataError(f"{path} {how} since its index {file} was made", remedy)
    return stored


def _change(path: str, stored: ShardIndex, row: int, file: Path) -> str | None:
    """Return how a shard differs from its row of an index; None if it does not."""
    if (size := os.stat(path).st_size) != stored.shard_bytes[row]:
        return f"has {size:,} bytes instead of {stored.shard_bytes[row]:,}"
    if stored.shard_stamps and stamp_of(path) != stored.shard_stamps[row]:
        return "has changed its contents"
    if stored.is_scan:
        before, now = stored.shard_mtime_ns, mtime_of(path)
        if now != before[row] if before else now > file.stat().st_mtime_ns:
            return "was written anew"
    return None


def _scan_index(paths: list[str], members: Members, folder: str) -> ShardIndex:
    """Scan shards. Times and stamps are taken first, so that a shard that changes meanwhile is scanned again."""
    mtimes, stamps = tuple(map(mtime_of, paths)), tuple(map(stamp_of, paths))
    found = index_of(paths, scan_shards(paths, members), classes=read_classes(folder), provenance=_scanned(members))
    return replace(found, shard_mtime_ns=mtimes, shard_stamps=stamps)


def _with_classes(index: ShardIndex, classes: tuple[str, ...]) -> ShardIndex:
    """Return the index with the names that `classes.json` has now."""
    if classes == index.classes or not (classes or index.is_scan):
        return index
    check_labels(index, classes)
    return replace(index, classes=classes)


def _digest_of(paths: tuple[str, ...]) -> str:
    """Return a part of the name of a cached index, which changes when a local shard changes (size or mtime)."""
    stats = [(path, None if is_url(path) else os.stat(path)) for path in paths]
    states = [(path, stat.st_size, stat.st_mtime_ns) if stat else (path,) for path, stat in stats]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:24]


def _fetch_index(url: str) -> Path:
    """Download a remote index and return its local file, which does not exist if the server has none.

    It is downloaded on every call, because the shards may have been rewritten.
    """
    check_url(url)
    file = user_cache() / "index" / f"{hashlib.sha256(url.encode()).hexdigest()}{SUFFIX}"
    try:
        if (data := read_small(url)) is None:
            file.unlink(missing_ok=True)
        else:
            make_user_cache()
            write_whole(file, data)
    except OSError as error:
        raise DataError(f"the index {url} cannot be kept in {file.parent}: {error}", _ELSEWHERE) from error
    return file


def _save_where_possible(index: ShardIndex, beside: Path | None, cached: Path) -> None:
    """Save the index beside the shards (`beside`; None if remote), else in the cache; if both fail, only warn."""
    # the mode bits are checked too, because os.access lets root write into read-only folders
    if beside and beside.parent.stat().st_mode & 0o222 and os.access(beside.parent, os.W_OK):
        with suppress(OSError):  # a full disk, or a network drive that refuses for reasons of its own
            save_index(index, beside)
            return
    try:
        make_user_cache()
        save_index(index, cached)
    except OSError as error:
        warn(f"the index could not be saved and will be made again next time: {error}; {_ELSEWHERE}")
