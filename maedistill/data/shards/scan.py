"""Scan one shard: group its members into samples by key, parse the labels and count all other members.

A member's key ends at the first dot of its file name, as in WebDataset; what follows is its field. The image of a
sample is its field `jpg`, `jpeg`, `png` or `webp`, or the one field that ends so (`input.jpg`); its label is `cls` or
the one field that ends so, whose text is the class id. `Members` names other fields. Fields may be upper-case, keys may
hold folders, and members may come in any order. Other members are never opened.

    shard.tar or its URL -> walk_tar -> scan_shard -> ShardScan (rows in archive order, checksum)
"""

import functools
import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from typing import NamedTuple

from tqdm.contrib.concurrent import thread_map

from maedistill.data.remote.cache import ShardCache
from maedistill.data.remote.download import RemoteShard, file_size
from maedistill.data.remote.urls import is_url
from maedistill.data.shards.progress_bar import ProgressBar
from maedistill.data.shards.tars import walk_tar
from maedistill.errors import DataError, join_first

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
LABEL_SUFFIX = "cls"
NO_LABEL = -1
THREADS = 4  # shards at a time: hashing and disk reads overlap; parsing the headers holds the GIL
_LONGEST_LABEL = 64  # bytes that are read of a label
_DAY = 86_400  # seconds

_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # WebDataset's `base_plus_ext`
_LABEL = re.compile(rb"[0-9]{1,6}")  # int() would also accept "1_0" and non-ASCII digits
_BOM = b"\xef\xbb\xbf"
_Places = dict[str, tuple[int, int]]  # field -> offset, size


class Members(NamedTuple):
    """Which fields of a sample are its image and its label, e.g. `input.jpg`; None for the usual ones.

    Several may be given, separated by `;`: the first that a sample has counts.
    """

    image: str | None = None
    label: str | None = None


USUAL = Members()


@dataclass(frozen=True)
class ShardScan:
    """The samples of one shard, in archive order: four lists of equal length."""

    num_bytes: int
    sha256: str
    keys: list[str]
    offsets: list[int]  # of the image's first byte from the start of the shard
    sizes: list[int]  # bytes
    labels: list[int]  # NO_LABEL for unlabelled samples
    ignored: Counter[str] = field(default_factory=Counter, compare=False)  # other members by suffix
    unread: dict[str, str] = field(default_factory=dict, compare=False)  # key -> its label, which is no class id


def scan_shards(paths: list[str], members: Members = USUAL) -> list[ShardScan]:
    """Scan all shards with a progress bar. Raise the first `DataError` in the order of `paths`."""
    scan = functools.partial(scan_shard, members=members)
    options = {"desc": "indexing shards", "unit": "shard", "tqdm_class": ProgressBar}
    return thread_map(scan, paths, max_workers=THREADS, **options)


def scan_shard(path: str, members: Members = USUAL) -> ShardScan:
    """Read the checksum, image offsets and labels of one shard. Raise `DataError` naming the shard and key.

    A remote shard is downloaded into the cache, also if a version of more than a day is there, which may be older than
    the server's; a younger one is of a scan that was interrupted, or of another process.
    It stays there until it is evicted; a damaged one is removed at once.
    """
    if not is_url(path):
        with open(path, "rb") as file:
            return _scan(file, path, members)
    cache, shard = ShardCache(), RemoteShard(path, file_size(path))
    cache.discard(shard, older_than=time.time() - _DAY)
    with open(cache.open(shard), "rb") as file:
        try:
            return _scan(file, path, members)
        except DataError:
            cache.discard(shard)
            raise


def why_unlabelled(path: str, key: str, members: Members = USUAL) -> str | None:
    """Return what the label of a sample says that is no class id; None if there is no label, or the shard is remote."""
    if is_url(path):
        return None
    with open(path, "rb") as file:
        return _scan(file, path, members, checksum=False).unread.get(key)


def _scan(file: BufferedReader, path: str, members: Members, *, checksum: bool = True) -> ShardScan:
    num_bytes, sha256 = os.fstat(file.fileno()).st_size, ""
    if checksum:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    samples, ignored = _samples(file, path, are_plain=members.image is not None)
    chosen = {key: _image_field(path, key, places, members) for key, places in samples.items()}
    scan = ShardScan(num_bytes, sha256, [], [], [], [], ignored)
    for key, places in samples.items():
        if (image := chosen[key]) is None:
            if _ending(places, [LABEL_SUFFIX]) and not members.image:
                raise DataError(
                    f"{path}: {key!r} has a label but no image; its members are {join_first(sorted(places))}",
                    "write this shard again; images must end in " + ", ".join(f".{s}" for s in sorted(IMAGE_SUFFIXES)),
                )
        else:
            offset, size = places.pop(image)
            scan.keys.append(key)
            scan.offsets.append(offset)
            scan.sizes.append(size)
            scan.labels.append(_take_label(file, key, places, members, scan.unread))
        ignored.update(f".{name}" for name in places)
    if samples and not scan.keys and members.image:
        raise DataError(
            f"{path}: no sample has {members.image}, they have {join_first(sorted(ignored))}",
            "name one of these without its dot in data.image_key, or leave the key out",
        )
    return scan


def _samples(file: BufferedReader, path: str, *, are_plain: bool) -> tuple[dict[str, _Places], Counter[str]]:
    """Return the members of each sample by field, in archive order, and the count of members without a key.

    are_plain: keys are WebDataset's without exception.
    """
    samples: dict[str, _Places] = {}
    ignored: Counter[str] = Counter()
    names = []
    for name, offset, size in walk_tar(file, path):
        base = name.rpartition("/")[2]
        match = _KEY.fullmatch(name)
        if match is None or base.startswith("._"):  # the latter: metadata with an image's suffix, by macOS's tar
            ignored[f".{name.rpartition('.')[2].lower()}" if "." in base[1:] else name] += 1
            continue
        names.append((match[1], match[2].lower(), name, offset, size))
    whole = set() if are_plain else _keys_with_dots(names)
    for key, suffix, name, offset, size in names:
        if key in whole:
            key, _, suffix = name.rpartition(".")
            suffix = suffix.lower()
        places = samples.setdefault(key, {})
        if suffix in places:
            raise DataError(f"{path}: the key {key!r} occurs twice", "write this shard again with unique keys")
        places[suffix] = offset, size
    return samples, ignored


def _keys_with_dots(names: Sequence[tuple[str, str, str, int, int]]) -> set[str]:
    """Return the keys, up to the first dot, of which not one sample was meant, but one for each image.

    Such are `frame.0001.jpg`, `frame.0002.jpg`, if no other key has these numbers, and `a.x.jpg`, `a.x.cls`,
    `a.y.jpg`, `a.y.cls`.
    """
    fields: dict[str, set[str]] = {}
    for key, suffix, *_ in names:
        fields.setdefault(key, set()).add(suffix)
    stems = {key: [name.rpartition(".")[0] for name in _ending(names, IMAGE_SUFFIXES)] for key, names in fields.items()}
    shared = Counter(stem for several in stems.values() for stem in several)

    def is_own(key: str, stem: str) -> bool:
        return bool(stem) and (f"{stem}.{LABEL_SUFFIX}" in fields[key] or (stem.isdecimal() and shared[stem] == 1))

    return {key for key, several in stems.items() if len(several) > 1 and all(is_own(key, stem) for stem in several)}


def _ending(fields: Iterable[str], suffixes: Collection[str]) -> list[str]:
    """Return the fields that end in one of the suffixes: `input.jpg` in `jpg`."""
    return [name for name in fields if name.rpartition(".")[2] in suffixes]


def _image_field(path: str, key: str, places: _Places, members: Members) -> str | None:
    """Return the field of a sample's image; None if it has none. Raise `DataError` if several may be meant."""
    if members.image:
        return next((name for name in members.image.lower().split(";") if name in places), None)
    images = _ending(places, IMAGE_SUFFIXES)
    plain = [name for name in images if "." not in name]
    if len(plain) > 1 or (not plain and len(images) > 1):
        raise DataError(
            f"{path}: the sample {key!r} has {len(images)} images: {join_first(sorted(images), 5)}",
            f"say which one is meant, e.g. data.image_key={sorted(plain or images)[0]}; WebDataset's keys end at the "
            "first dot of the file name",
        )
    return next(iter(plain or images), None)


def _take_label(file: BufferedReader, key: str, places: _Places, members: Members, unread: dict[str, str]) -> int:
    """Remove the label from a sample's fields and return its class id; note in `unread` what is none."""
    if members.label:
        labels = [name for name in members.label.lower().split(";") if name in places][:1]
    else:
        labels = _ending(places, [LABEL_SUFFIX])
        labels = [LABEL_SUFFIX] if LABEL_SUFFIX in labels else labels
    if len(labels) != 1:
        if labels:
            unread[key] = f"{key!r} has several labels, {join_first(sorted(labels), 5)}: data.label_key chooses"
        return NO_LABEL
    offset, size = places.pop(labels[0])
    text = os.pread(file.fileno(), min(size, _LONGEST_LABEL), offset)
    number = text.removeprefix(_BOM).strip(b" \t\r\n\0")
    if size <= _LONGEST_LABEL and _LABEL.fullmatch(number):
        return int(number)
    unread[key] = f"{key + '.' + labels[0]!r} holds {text[:40]!r}"
    return NO_LABEL
