"""Scan one shard: group its members into samples by key, parse the labels and count all other members.

A sample is `KEY.jpg|jpeg|png|webp` with an optional `KEY.cls`, whose text is the class id. Suffixes may be upper-case,
keys may hold dots and folders, and members may come in any order. Other members are never opened.

    shard.tar or its URL -> walk_tar -> scan_shard -> ShardScan (rows in archive order, checksum)
"""

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from io import BufferedReader

from tqdm.contrib.concurrent import thread_map

from maedistill.data.remote.cache import ShardCache
from maedistill.data.remote.download import RemoteShard, file_size
from maedistill.data.remote.urls import is_url
from maedistill.data.shards.progress_bar import ProgressBar
from maedistill.data.shards.tars import walk_tar
from maedistill.errors import DataError

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
LABEL_SUFFIX = "cls"
NO_LABEL = -1
THREADS = 4  # shards at a time: hashing and disk reads overlap; parsing the headers holds the GIL

_LABEL = re.compile(rb"[0-9]{1,6}\n?")  # int() would also accept "1_0", " 7" and non-ASCII digits


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


def scan_shards(paths: list[str]) -> list[ShardScan]:
    """Scan all shards with a progress bar. Raise the first `DataError` in the order of `paths`."""
    options = {"desc": "indexing shards", "unit": "shard", "tqdm_class": ProgressBar}
    return thread_map(scan_shard, paths, max_workers=THREADS, **options)


def scan_shard(path: str) -> ShardScan:
    """Read the checksum, image offsets and labels of one shard. Raise `DataError` naming the shard and key.

    A remote shard is downloaded into the cache and stays there until it is evicted; a damaged one is removed at once.
    """
    if not is_url(path):
        with open(path, "rb") as file:
            return _scan(file, path)
    cache, shard = ShardCache(), RemoteShard(path, file_size(path))
    with open(cache.open(shard), "rb") as file:
        try:
            return _scan(file, path)
        except DataError:
            cache.discard(shard)
            raise


def _scan(file: BufferedReader, path: str) -> ShardScan:
    images: dict[str, tuple[int, int]] = {}  # key -> offset, size
    labels: dict[str, int] = {}
    ignored: Counter[str] = Counter()
    num_bytes, sha256 = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
    for name, offset, size in walk_tar(file, path):
        key, _, suffix = name.rpartition(".")
        suffix = suffix.lower()
        is_label = suffix == LABEL_SUFFIX
        is_resource_fork = name.rpartition("/")[2].startswith("._")  # metadata with an image's suffix, by macOS's tar
        if is_resource_fork or not (is_label or suffix in IMAGE_SUFFIXES):
            ignored["." + suffix if key else name] += 1
        elif key in (labels if is_label else images):
            raise DataError(f"{path}: the key {key!r} occurs twice", "write this shard again with unique keys")
        elif is_label:
            text = os.pread(file.fileno(), min(size, 16), offset)
            if not _LABEL.fullmatch(text) or size > len(text):
                raise DataError(
                    f"{path}: {name!r} holds {text!r}, which is not a class id",
                    "a label is one number from 0 to 999999 in decimal text; leave the .cls file out for no label",
                )
            labels[key] = int(text)
        else:
            images[key] = offset, size
    if orphans := labels.keys() - images.keys():
        raise DataError(
            f"{path}: {min(orphans)!r} has a label but no image ({len(orphans)} such keys)",
            "write this shard again; images must end in " + ", ".join("." + s for s in sorted(IMAGE_SUFFIXES)),
        )
    offsets, sizes = [offset for offset, _ in images.values()], [size for _, size in images.values()]
    rows = [labels.get(key, NO_LABEL) for key in images]
    return ShardScan(num_bytes, sha256, list(images), offsets, sizes, rows, ignored)
