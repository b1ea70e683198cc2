"""Cache of remote shards: one folder of whole files with a size limit, shared by all processes of a machine.

    URL, size, checksum -> ShardCache.open -> descriptor of the whole, verified shard

    URLHASH-SIZE.part     a partial download; its writer holds an exclusive lock, other processes wait for that lock
    URLHASH-CONTENT.tar   a whole shard; readers hold a shared lock, and only unlocked files are evicted

The locks are on the files themselves, so the kernel releases them however the process ends. A killed download leaves
only a `.part`, which the next download resumes. A file's access time records its last use. Files with other names
do not belong to the cache; they are neither counted nor removed.

The folder belongs to one user, see `private.py`. Each process checks a shard's checksum before it first uses it, and
again if the file has changed: a disk may flip a bit after the download.
"""

import fcntl
import hashlib
import itertools
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from maedistill.data.remote.download import RemoteShard, RetryPolicy, download
from maedistill.data.remote.private import lock, open_private_file, open_private_folder, try_lock
from maedistill.data.remote.urls import is_url
from maedistill.data.remote.user_cache import FOLDER_VARIABLE, user_cache
from maedistill.errors import ConfigError, DataError

BOUND_VARIABLE = "MAEDISTILL_CACHE_GB"
DEFAULT_GB = 100.0  # gigabytes (1e9 bytes)
_OURS = re.compile(r"[0-9a-f]{64}-([0-9]+\.part|[0-9a-f]{16}\.tar)")
_KEPT_FREE = 1_000_000_000  # bytes of the disk, at most 2 % of it: checkpoints may be written to it, too
_POLL = 0.05  # seconds between two attempts to make room
_FRESH = 1.0  # seconds within which the time of last use is not updated again
_verified: dict[str, tuple[int, int, int]] = {}  # this process: path -> inode, bytes, time of change of a checked shard


def default_folder() -> Path:
    """Return the cache folder: MAEDISTILL_CACHE, else `maedistill/shards` in the user's cache."""
    return user_cache() if os.environ.get(FOLDER_VARIABLE) else user_cache() / "shards"


def default_bound() -> int:
    """Return the size limit of the cache in bytes: MAEDISTILL_CACHE_GB, else 100 GB. Raise `ConfigError` if invalid."""
    text = os.environ.get(BOUND_VARIABLE, str(DEFAULT_GB))
    try:
        bound = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        bound = 0
    if bound <= 0:
        raise ConfigError(f"{BOUND_VARIABLE} is {text!r}", "give the gigabytes that the cache may take, e.g. 100")
    return bound


@dataclass(frozen=True)
class ShardCache:
    """A folder with at most `max_bytes` of shards. All state is on disk, so pickling, forks and threads are safe."""

    folder: Path = field(default_factory=default_folder)
    max_bytes: int = field(default_factory=default_bound)
    policy: RetryPolicy = field(default_factory=RetryPolicy)

    def open(self, shard: RemoteShard) -> int:
        """Return a descriptor of the whole shard, with a shared lock; download it if necessary. The caller closes it.

        Raise `DataError` naming the URL if the download fails or differs from the index, or the cache is too small.
        """
        descriptor = None
        while descriptor is None:  # another process downloaded it, or evicted it before we held the lock
            descriptor = self._get(shard, wait=True)
        return descriptor

    def fetch(self, shard: RemoteShard) -> None:
        """Download the shard unless it is cached or another process is downloading it. Raise as `open` does."""
        if (descriptor := self._get(shard, wait=False)) is not None:
            os.close(descriptor)

    def discard(self, shard: RemoteShard, *, older_than: float = math.inf) -> None:
        """Remove the shard, because it is damaged or may be old; without a checksum, every version of it.

        older_than: a time in seconds; only what was downloaded before it.
        """
        for path in self._whole(shard):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < older_than:
                    path.unlink()

    def _get(self, shard: RemoteShard, *, wait: bool) -> int | None:
        """Return a descriptor of the shard; None if another process downloads it (`wait`: once that has ended)."""
        try:
            descriptor = self._open_whole(shard)
            return self._download(shard, wait=wait) if descriptor is None else descriptor
        except OSError as error:  # such as a full disk or missing permissions
            raise DataError(
                f"the cache of remote shards {self.folder} cannot be used: {error}",
                f"free disk space, or name another folder: {FOLDER_VARIABLE}=DIR",
            ) from error

    def _whole(self, shard: RemoteShard) -> list[Path]:
        """Return the shard's possible cache files. Without a checksum, any cached version of the URL is a candidate."""
        name = _url_hash(shard.url)
        if shard.sha256:
            return [self.folder / f"{name}-{shard.sha256[:16]}.tar"]
        return list(self.folder.glob(f"{name}-*.tar"))

    def _open_whole(self, shard: RemoteShard) -> int | None:
        for path in self._whole(shard):
            try:
                descriptor = open_private_file(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            try:
                lock(descriptor, fcntl.LOCK_SH, seconds=self.policy.max_seconds, name=path)
                state = os.fstat(descriptor)
                whole = state.st_size == shard.num_bytes and _has_checksum(descriptor, state, path)
            except BaseException:
                os.close(descriptor)
                raise
            if state.st_nlink and whole:  # no link: evicted before we got the lock
                if time.time() - state.st_atime > _FRESH:
                    os.utime(descriptor, ns=(time.time_ns(), state.st_mtime_ns))
                return descriptor
            os.close(descriptor)
            if state.st_nlink:  # another version, or changed by another program or the disk
                path.unlink(missing_ok=True)
        return None

    def _download(self, shard: RemoteShard, *, wait: bool) -> int | None:
        part = self.folder / f"{_url_hash(shard.url)}-{shard.num_bytes}.part"
        descriptor, mine = self._reserve(shard, part)
        if descriptor is None:
            return None
        try:
            if not mine:
                if wait:  # until the writer ends, whose time is limited
                    lock(descriptor, fcntl.LOCK_SH, seconds=2 * self.policy.max_seconds, name=part)
                os.close(descriptor)
                return None
            sha256 = download(shard, descriptor, policy=self.policy)
            os.fsync(descriptor)
            with self._locked() as folder:
                whole = self.folder / f"{_url_hash(shard.url)}-{sha256[:16]}.tar"
                part.rename(whole)
                os.fsync(folder)
            _verified[str(whole)] = _identity(os.fstat(descriptor))
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _reserve(self, shard: RemoteShard, part: Path) -> tuple[int | None, bool]:
        """Open the `.part` and make room for it. Return it (None if the shard is whole) and whether we locked it."""
        deadline = time.monotonic() + self.policy.max_seconds
        while True:
            with self._locked():
                if any(path.exists() for path in self._whole(shard)):
                    return None, False
                if not (too_large := shard.num_bytes > self.max_bytes):
                    is_new = not part.exists()
                    descriptor = open_private_file(part, os.O_RDWR | os.O_CREAT)
                    try:
                        mine = try_lock(descriptor)
                        fits = not mine or self._make_room()  # of another process: it has made room
                        if not fits and is_new:
                            part.unlink()
                    except BaseException:
                        os.close(descriptor)
                        raise
                    if fits:
                        return descriptor, mine
                    os.close(descriptor)
                # all are in use; wait, as they may be released
                others = any(path != part for path, *_ in self._files())
            if too_large or not others or time.monotonic() > deadline:
                raise DataError(
                    f"{shard.url} has {shard.num_bytes:,} bytes, for which the cache {self.folder} has no room",
                    f"free disk space, or allow more than {self.max_bytes / 1e9:g} GB: {BOUND_VARIABLE}=...",
                )
            time.sleep(_POLL)

    def _make_room(self) -> bool:
        """Evict unlocked files, least recently used first, until all fit. Return whether they do.

        The disk must hold what all downloads lack, also those that have only begun, and keep `_KEPT_FREE`.
        """
        files = sorted(self._files(), key=lambda file: file[3])
        used, lacking = (sum(sizes) for sizes in zip(*(file[1:3] for file in files), strict=True))

        def fits() -> bool:
            disk = shutil.disk_usage(self.folder)
            return used <= self.max_bytes and lacking + min(_KEPT_FREE, disk.total // 50) <= disk.free

        for path, num_bytes, missing, _ in files:
            if not fits() and _remove_unused(path):
                used, lacking = used - num_bytes, lacking - missing
        return fits()

    def _files(self) -> Iterator[tuple[Path, int, int, float]]:
        """Yield path, bytes, bytes still to come, and time of last use of each file. A `.part` has its final size."""
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    state = path.lstat()
                    size = int(path.stem.rpartition("-")[2]) if path.suffix == ".part" else state.st_size
                    yield path, size, max(0, size - state.st_size), state.st_atime

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Lock the folder and yield its descriptor, so that one process at a time evicts, creates or renames files."""
        descriptor = open_private_folder(self.folder, f"name another folder: {FOLDER_VARIABLE}=DIR")
        try:
            lock(descriptor, fcntl.LOCK_EX, seconds=self.policy.max_seconds, name=self.folder)
            yield descriptor
        finally:
            os.close(descriptor)


def largest_window(shard_bytes: Sequence[int], cache_bytes: int) -> int:
    """Return the largest `data.shuffle_window`: all shards if the cache can hold them, else as many as fit twice.

    One window is read while the next one is downloaded. The result is 0 if not even two shards fit.
    """
    if sum(shard_bytes) <= cache_bytes:
        return len(shard_bytes)
    totals = itertools.accumulate(sorted(shard_bytes, reverse=True))
    return sum(total <= cache_bytes for total in totals) // 2


def require_room(
    shards: Sequence[str], shard_bytes: Sequence[int], *, window: int | None, cache_bytes: int | None = None
) -> None:
    """Raise `ConfigError` if training would download remote shards repeatedly.

    window: of the shuffle, in shards; None for all. cache_bytes: None for `default_bound`.
    """
    if not any(map(is_url, shards)):
        return
    cache_bytes = default_bound() if cache_bytes is None else cache_bytes
    largest = largest_window(shard_bytes, cache_bytes)
    if (window or len(shard_bytes)) <= largest:
        return
    needed = sum(shard_bytes) if largest else sum(sorted(shard_bytes)[-2:])
    gigabytes = f"{math.ceil(needed / 1e6) / 1000:g}"
    remedy = f"set data.shuffle_window={largest}, or {BOUND_VARIABLE}={gigabytes}"
    if not largest:
        remedy = f"set data.shuffle_window=1 and {BOUND_VARIABLE}={gigabytes} or more"
    raise ConfigError(
        f"data.shuffle_window is {window or 'null'}, but a cache of {cache_bytes / 1e9:g} GB, which holds two windows, "
        f"allows at most {largest} of the {len(shard_bytes):,} remote shards ({sum(shard_bytes) / 1e9:.3g} GB)",
        remedy,
    )


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process has locked it. Return whether it is gone."""
    try:
        descriptor = open_private_file(path, os.O_RDWR)  # NFS needs a writable descriptor for an exclusive lock
    except FileNotFoundError:
        return True
    try:
        if is_unused := try_lock(descriptor):
            path.unlink(missing_ok=True)
        return is_unused
    finally:
        os.close(descriptor)


def _has_checksum(descriptor: int, state: os.stat_result, path: Path) -> bool:
    """Return whether the file's content has the checksum in its name. It is read once, and again after a change."""
    if _verified.get(str(path)) == _identity(state):
        return True
    with open(descriptor, "rb", closefd=False) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    os.lseek(descriptor, 0, os.SEEK_SET)
    if matches := sha256.startswith(path.stem.rpartition("-")[2]):
        _verified[str(path)] = _identity(state)
    return matches


def _identity(state: os.stat_result) -> tuple[int, int, int]:
    """Return what changes when a file is replaced or written to; its time of last use does not count."""
    return state.st_ino, state.st_size, state.st_mtime_ns


def _url_hash(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()
