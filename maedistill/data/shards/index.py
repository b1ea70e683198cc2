"""The shard index: each sample's shard, byte range, label and key, so that reading any image takes one read.

`make_shards` writes the index beside the shards. Shards from other tools are scanned once, strictly, and their index is
saved beside them, or in the user's cache if the folder is read-only or remote. The index is one safetensors file: six
arrays, and a JSON text with everything else.

    open_index("DIR/train-*.tar") -> ShardIndex       sample ids are 0 .. n-1, shard after shard, in archive order

Letters: `n` samples, `m` shards. This module imports neither torch nor an image library.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from maedistill.data.remote.cache import user_cache
from maedistill.data.remote.download import read_small
from maedistill.data.remote.urls import check_url, is_url
from maedistill.data.shards.index_check import check_arrays, check_text, is_text, parse_json
from maedistill.data.shards.patterns import Split, find_shards, split_name
from maedistill.data.shards.scan import NO_LABEL, USUAL, Members, ShardScan, scan_shards, why_unlabelled
from maedistill.data.shards.stamps import mtime_of, stamp_of
from maedistill.errors import ConfigError, DataError, join_first

FORMAT = 1
SUFFIX = ".index.safetensors"
CLASSES_FILE = "classes.json"
SCANNED = {"made_by": "scan"}
MOST_SUFFIXES = 20  # limit for one log message, because a hostile shard may hold any number of them

_ARRAYS = ("starts", "offsets", "sizes", "labels", "key_text", "key_ends")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The location of every sample. Sample `i` is `sizes[i]` bytes at `offsets[i]` of `shards[shard_of(i)]`."""

    shards: tuple[str, ...]  # absolute paths or URLs
    shard_bytes: tuple[int, ...]
    shard_sha256: tuple[str, ...]
    starts: np.ndarray  # int64 [m + 1], the first sample of each shard, then n
    offsets: np.ndarray  # int64 [n]
    sizes: np.ndarray  # int64 [n]
    labels: np.ndarray  # int64 [n], NO_LABEL (-1) for unlabelled samples
    classes: tuple[str, ...]  # names, position = label; empty if the names are unknown
    key_text: np.ndarray  # uint8, all keys concatenated, in UTF-8
    key_ends: np.ndarray  # int64 [n]
    provenance: dict[str, Any] = field(default_factory=dict)  # the settings of make_shards, or SCANNED and the members
    shard_stamps: tuple[str, ...] = ()  # see stamps.py; empty if they were not taken
    shard_mtime_ns: tuple[int, ...] = ()  # of a scan; empty if they were not taken
    apply_exif: bool = False  # whether its readers turn photographs upright; not saved

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, i: int) -> str:
        """Return the name of sample `i` inside its shard, without suffix."""
        start = self.key_ends[i - 1] if i else 0
        return self.key_text[start : self.key_ends[i]].tobytes().decode()

    def shard_of(self, i: int) -> int:
        """Return the position in `shards` of the shard that holds sample `i`."""
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def sample_name(self, i: int) -> str:
        """Return the name of sample `i` for error messages: `SHARD:KEY`."""
        return f"{self.shards[self.shard_of(i)]}:{self.key(i)}"

    def scan_of(self, shard: int) -> ShardScan:
        """Return the rows of one shard, equal to those of its scan."""
        first, last = self.starts[shard], self.starts[shard + 1]
        columns = (array[first:last].tolist() for array in (self.offsets, self.sizes, self.labels))
        keys = [self.key(i) for i in range(first, last)]
        return ShardScan(self.shard_bytes[shard], self.shard_sha256[shard], keys, *columns)

    @property
    def is_scan(self) -> bool:
        """Return whether the index was made by scanning shards of other tools, and can be made again."""
        return self.provenance.get("made_by") == SCANNED["made_by"]

    @property
    def num_classes(self) -> int:
        """Return the number of named classes, or the largest label + 1 if the names are unknown."""
        return len(self.classes) or int(self.labels.max(initial=NO_LABEL)) + 1

    def fingerprint(self) -> str:
        """Return a hex digest of the samples and their order. It does not depend on where the shards are stored."""
        digest = hashlib.sha256()
        for array in (self.starts, self.sizes, self.labels, self.key_ends, self.key_text):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def members(self) -> Members:
        """Return which fields of a sample were read, if they were chosen."""
        return Members(self.provenance.get("image_key"), self.provenance.get("label_key"))

    def require_labels(self) -> None:
        """Raise `DataError`, naming the first unlabelled sample and what its label says, unless all have a label."""
        if len(bare := np.flatnonzero(self.labels == NO_LABEL)):
            i = int(bare[0])
            shard = self.shards[self.shard_of(i)]
            first, remedy = f"{self.key(i)!r} in {shard}", "use labelled shards here (KEY.cls beside each KEY.jpg)"
            if reason := why_unlabelled(shard, self.key(i), self.members):
                first = f"{shard}: {reason}"
                remedy = (
                    "a label is one number from 0 to 999999: write the numbers of the classes in place of names, and "
                    "leave out samples without a class; another member may hold it (data.label_key)"
                )
            raise DataError(
                f"{len(bare):,} of {len(self):,} samples have no label, first {first}",
                f"{remedy}; only pre-training and a teacher's predictions alone (distill.label_weight=0 with "
                "distill.logits or distill.hard_label) need none",
            )
        if len(self) and not self.classes and self.labels.min() > 0:
            _log.warning(
                "the smallest label is %d: class 0 never occurs, and the network gets an output for it anyway",
                self.labels.min(),
            )


def why_unscorable(train: ShardIndex, val: ShardIndex) -> str | None:
    """Return why `train` cannot classify the images of `val`, as kNN and linear probes do; None if it can."""
    for name, index in (("training", train), ("validation", val)):
        if bare := int(np.count_nonzero(index.labels == NO_LABEL)):
            return f"{bare:,} of {len(index):,} {name} images have no label"
    if not np.isin(val.labels, train.labels).any():
        count = len(np.unique(val.labels))
        return f"none of the {count:,} classes in the validation images has a training image"
    return None


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
    paths = find_shards(shards, split=split)
    folder, wanted = os.path.dirname(paths[0]), _scanned(members)
    address = index or os.path.join(folder, _index_name(paths, members))
    beside = _fetch_index(address) if is_url(address) else Path(address)
    if index and not beside.is_file():
        raise DataError(f"the index {index} does not exist", "leave data.index out: the shards are then scanned once")
    cached = _cache_file(paths, members)
    if not (index or is_url(folder)) and members != USUAL and not beside.is_file():
        _refuse_choice(Path(folder, _index_name(paths, USUAL)))
    file = next((file for file in (beside, cached) if file.is_file() and _is_current(file, paths, wanted, index)), None)
    stored = load_index(file) if file else None
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
    return replace(selected, apply_exif=apply_exif)


def _scanned(members: Members) -> dict[str, Any]:
    """Return the provenance of a scan: the fields are noted only if they were chosen."""
    keys = {"image_key": members.image, "label_key": members.label}
    return SCANNED | {name: value for name, value in keys.items() if value is not None}


def _index_name(paths: tuple[str, ...], members: Members) -> str:
    """Return the file name of the shards' index: one of its own for chosen fields."""
    chosen = "" if members == USUAL else "." + hashlib.sha256(repr(tuple(members)).encode()).hexdigest()[:8]
    return split_name(paths) + chosen + SUFFIX


def _refuse_choice(made: Path) -> None:
    """Raise `ConfigError` if the shards have an index of make_shards, in which there is nothing to choose."""
    if made.is_file() and not load_index(made).is_scan:
        raise ConfigError(
            f"{made} is an index of maedistill shards, whose samples have one image and one label",
            "leave data.image_key and data.label_key out",
        )


def _is_current(file: Path, paths: tuple[str, ...], wanted: dict[str, Any], index: str | None) -> bool:
    """Return whether an index still says what its shards hold. Raise `DataError` if it does not, nor can be made again.

    A scan is made again if a shard of it has another size, time of change or stamp. One of an earlier version, which
    noted no times, is if a shard is younger than it.
    """
    stored = load_index(file)
    row_of = {name: row for row, name in enumerate(stored.shards)}
    local = [(path, row_of[name]) for path in paths if (name := os.path.basename(path)) in row_of and not is_url(path)]
    if stored.is_scan and stored.provenance != wanted:
        raise DataError(
            f"{file} was made with other members than data.image_key and data.label_key choose",
            "leave data.index out, or choose the same" if index else "remove it: the shards are then scanned once",
        )
    for path, row in local:
        how = _change(path, stored, row, file)
        if how and stored.is_scan and not index:
            _log.warning("%s %s since it was scanned: the shards are scanned again", path, how)
            return False
        if how:
            remedy = "copy the shard again"
            if stored.is_scan:
                remedy += f", or, if it was changed on purpose, remove {file}: the shards are then scanned once"
            raise DataError(f"{path} {how} since its index {file} was made", remedy)
    return True


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
    _check_labels(index, classes)
    return replace(index, classes=classes)


def index_of(
    paths: Sequence[str], scans: Sequence[ShardScan], *, classes: tuple[str, ...], provenance: dict[str, Any]
) -> ShardIndex:
    """Combine shard scans into one index. Raise `DataError` for a label without a class name."""
    keys = [key.encode() for scan in scans for key in scan.keys]
    index = ShardIndex(
        shards=tuple(paths),
        shard_bytes=tuple(scan.num_bytes for scan in scans),
        shard_sha256=tuple(scan.sha256 for scan in scans),
        starts=np.cumsum([0, *(len(scan.keys) for scan in scans)], dtype=np.int64),  # [m + 1]
        offsets=np.array([offset for scan in scans for offset in scan.offsets], dtype=np.int64),  # [n]
        sizes=np.array([size for scan in scans for size in scan.sizes], dtype=np.int64),  # [n]
        labels=np.array([label for scan in scans for label in scan.labels], dtype=np.int64),  # [n]
        classes=classes,
        key_text=np.frombuffer(b"".join(keys), dtype=np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),  # [n]
        provenance=provenance,
    )
    if ignored := sum((scan.ignored for scan in scans), Counter[str]()):
        counts = join_first([f"{suffix!r}: {count}" for suffix, count in ignored.most_common()], MOST_SUFFIXES)
        _log.warning("members that are neither the image nor the label of a sample are never opened: {%s}", counts)
    if unread := [text for scan in scans for text in scan.unread.values()]:
        _log.warning("%d labels are no class number and count as none, first %s", len(unread), unread[0])
    _check_labels(index, classes)
    return index


def _check_labels(index: ShardIndex, classes: tuple[str, ...]) -> None:
    if classes and index.labels.max(initial=NO_LABEL) >= len(classes):
        i = int(index.labels.argmax())
        raise DataError(
            f"{index.shards[index.shard_of(i)]}: {index.key(i)!r} has the label {index.labels[i]}, but {CLASSES_FILE} "
            f"names {len(classes)} classes",
            f"correct {CLASSES_FILE} beside the shards (a JSON list of names, position = label), or remove it",
        )


def select_shards(index: ShardIndex, paths: Sequence[str]) -> ShardIndex:
    """Return the index of the shards in `paths`, in that order. Their file names must be in `index`."""
    row_of = {os.path.basename(path): row for row, path in enumerate(index.shards)}
    rows = [row_of[os.path.basename(path)] for path in paths]
    if rows == list(range(len(index.shards))):
        return replace(index, shards=tuple(paths))
    scans = [index.scan_of(row) for row in rows]
    return index_of(paths, scans, classes=index.classes, provenance=index.provenance)  # stamps were compared before


def save_index(index: ShardIndex, file: Path) -> None:
    """Write the index to a file, which replaces the old one at once."""
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    text = {
        "format": FORMAT,
        "shards": [os.path.basename(path) for path in index.shards],
        "shard_bytes": index.shard_bytes,
        "shard_sha256": index.shard_sha256,
        "classes": index.classes,
        "made": index.provenance,
    }
    extra = {"shard_stamps": index.shard_stamps, "shard_mtime_ns": index.shard_mtime_ns}
    text |= {name: values for name, values in extra.items() if values}
    # one metadata entry: safetensors writes several in random order, and the file must be reproducible
    _write(file, save(arrays, {"index": json.dumps(text)}))


def load_index(file: Path) -> ShardIndex:
    """Read a saved index, whose `shards` are bare file names. Raise `DataError` if it is damaged or inconsistent."""
    try:
        with safe_open(file, framework="numpy") as stored:
            text = parse_json(stored.metadata()["index"])
            arrays = {name: stored.get_tensor(name) for name in _ARRAYS}
        check_text(text)
        if text["format"] != FORMAT:
            raise ValueError(f"it has format {text['format']}")
        check_arrays(arrays, text)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        reason = " ".join(str(error)[:200].split())
        raise DataError(
            f"{file} is no index of format {FORMAT} ({type(error).__name__}: {reason})",
            "remove it: the shards are then scanned once",
        ) from error
    lists: dict[str, Any] = {name: tuple(text[name]) for name in ("shards", "shard_bytes", "shard_sha256", "classes")}
    extra: dict[str, Any] = {name: tuple(text.get(name, ())) for name in ("shard_stamps", "shard_mtime_ns")}
    return ShardIndex(**lists, **arrays, provenance=text["made"], **extra)


def read_classes(folder: str) -> tuple[str, ...]:
    """Read the class names from `classes.json`, a JSON list, in the shards' folder; empty if there is no such file."""
    file = f"{folder}/{CLASSES_FILE}"
    data = read_small(file) if is_url(folder) else Path(file).read_bytes() if os.path.isfile(file) else None
    if data is None:
        return ()
    try:
        names = parse_json(data)
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({str(error)[:200]})", "correct it, or remove it") from error
    if not isinstance(names, list) or not all(map(is_text, names)):
        raise DataError(f"{file} is not a list of names", 'write ["name of class 0", "name of class 1", ...]')
    return tuple(names)


def _cache_file(paths: tuple[str, ...], members: Members) -> Path:
    """Return the cached index file of these shards. Its name changes when a local shard changes (size or mtime)."""
    stats = [(path, None if is_url(path) else os.stat(path)) for path in paths]
    states = [(path, stat.st_size, stat.st_mtime_ns) if stat else (path,) for path, stat in stats]
    digest = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:24]
    return (
        user_cache() / "index" / f"{split_name(paths)}-{digest}{_index_name(paths, members)[len(split_name(paths)) :]}"
    )


def _fetch_index(url: str) -> Path:
    """Download a remote index and return its local file, which does not exist if the server has none.

    It is downloaded on every call, because the shards may have been rewritten.
    """
    check_url(url)
    file = user_cache() / "index" / f"{hashlib.sha256(url.encode()).hexdigest()}{SUFFIX}"
    if (data := read_small(url)) is None:
        file.unlink(missing_ok=True)
    else:
        _write(file, data)
    return file


def _save_where_possible(index: ShardIndex, beside: Path | None, cached: Path) -> None:
    """Save the index beside the shards (`beside`; None if remote), else in the cache; if both fail, only warn."""
    # the mode bits are checked too, because os.access lets root write into read-only folders
    if beside and beside.parent.stat().st_mode & 0o222 and os.access(beside.parent, os.W_OK):
        save_index(index, beside)
        return
    try:
        save_index(index, cached)
    except OSError as error:
        _log.warning("the index could not be saved and will be made again next time: %s", error)


def _write(file: Path, data: bytes) -> None:
    """Write a file under a temporary name, then rename it, so that a reader never sees a part of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(file)
