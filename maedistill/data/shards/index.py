"""The shard index: each sample's shard, byte range, label and key, so that reading any image takes one read.

`make_shards` writes the index beside the shards. Shards from other tools are scanned once, strictly, and their index is
saved beside them, or in the user's cache if the folder is read-only or remote. The index is one safetensors file: six
arrays, and a JSON text with everything else.

    open_index.py: "DIR/train-*.tar" -> ShardIndex     sample ids are 0 .. n-1, shard after shard, in archive order

Letters: `n` samples, `m` shards. This module imports neither torch nor an image library.
"""

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from maedistill.data.remote.download import read_small
from maedistill.data.remote.urls import is_url
from maedistill.data.shards.index_check import check_arrays, check_text, is_text, parse_json
from maedistill.data.shards.scan import NO_LABEL, Members, ShardScan, why_unlabelled
from maedistill.durable import make_folder, write_durably
from maedistill.errors import DataError, join_first
from maedistill.escaping import warn

FORMAT = 1
SUFFIX = ".index.safetensors"
CLASSES_FILE = "classes.json"
SCANNED = {"made_by": "scan"}
MOST_SUFFIXES = 20  # limit for one log message, because a hostile shard may hold any number of them

_ARRAYS = ("starts", "offsets", "sizes", "labels", "key_text", "key_ends")


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
            warn(
                f"the smallest label is {self.labels.min()}: class 0 never occurs, and the network gets an output for "
                "it anyway"
            )


def why_unscorable(train: ShardIndex, val: ShardIndex) -> str | None:
    """Return why `train` cannot classify the images of `val`, as kNN and linear probes do; None if it can."""
    for name, index in (("training", train), ("validation", val)):
        if bare := int(np.count_nonzero(index.labels == NO_LABEL)):
            return f"{bare:,} of {len(index):,} {name} images have no label"
    for label, (name, other) in enumerate(zip(train.classes, val.classes, strict=False)):
        if name != other:
            return f"label {label} is {name!r} in the training images and {other!r} in the validation images"
    if not np.isin(val.labels, train.labels).any():
        count = len(np.unique(val.labels))
        return f"none of the {count:,} classes in the validation images has a training image"
    return None


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
        warn(f"members that are neither the image nor the label of a sample are never opened: {{{counts}}}")
    if unread := [text for scan in scans for text in scan.unread.values()]:
        warn(f"{len(unread)} labels are not class numbers and count as missing, first {unread[0]}")
    check_labels(index, classes)
    return index


def check_labels(index: ShardIndex, classes: tuple[str, ...]) -> None:
    """Raise `DataError` if a label has no class name, where there are names."""
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
    write_whole(file, save(arrays, {"index": json.dumps(text)}))


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
            f"{file} is not an index of format {FORMAT} ({type(error).__name__}: {reason})",
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
    return tuple(unicodedata.normalize("NFC", name) for name in names)  # é is one character, or two on macOS


def write_whole(file: Path, data: bytes) -> None:
    """Write a file, with its folder, so that no reader ever sees a part of it."""
    make_folder(file.parent)
    write_durably(file, data)
