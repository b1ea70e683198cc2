"""The cache of remote shards: whole files in one folder, shared by all processes of a machine, never above its bound.

    URL, size, checksum -> ShardCache.open -> descriptor of the whole, verified shard

    URLHASH-SIZE.part     arriving; its writer holds an exclusive lock on it, the others wait for that lock
    URLHASH-CONTENT.tar   whole; a reader holds a shared lock, and only what nobody has locked is evicted

The locks are on the files themselves and end with their process, however it ends: a killed download leaves a `.part`
that the next one continues, and nothing else. A file's time of change says when it was last used. Files with other
names are none of the cache's: they are neither counted nor removed.
"""

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from maedistill.data.remote.download import RemoteShard, RetryPolicy, download
from maedistill.errors import ConfigError, DataError

FOLDER_VARIABLE, BOUND_VARIABLE = "MAEDISTILL_CACHE", "MAEDISTILL_CACHE_GB"
DEFAULT_GB = 100.0  # gigabytes (1e9 bytes)
_OURS = re.compile(r"[0-9a-f]{64}-([0-9]+\.part|[0-9a-f]{16}\.tar)")
_POLL = 0.05  # seconds between two looks for room
_FRESH = 1.0  # seconds for which a use need not be noted again


@dataclass(frozen=True)
class ShardCache:
    """A folder with at most `max_bytes` of shards. It holds no state, so it may be pickled, forked and threaded."""

    folder: Path = field(default_factory=lambda: default_folder())
    max_bytes: int = field(default_factory=lambda: default_bound())
    patience: RetryPolicy = field(default_factory=RetryPolicy)

    def open(self, shard: RemoteShard) -> int:
        """A descriptor of the whole shard, downloaded if need be, with a shared lock; the caller closes it.

        Raises `DataError` naming the URL: it cannot be had, it is not what the index says, or the cache is too small.
        """
        with self._naming_errors():
            while True:
                if (found := self._open_whole(shard)) is not None:
                    return found
                if (found := self._download(shard, wait=True)) is not None:
                    return found

    def fetch(self, shard: RemoteShard) -> None:
        """Downloads the shard, unless it is here or on its way in another process. Raises as `open` does."""
        with self._naming_errors():
            found = self._open_whole(shard)
            if found is None:
                found = self._download(shard, wait=False)
        if found is not None:
            os.close(found)

    def discard(self, shard: RemoteShard) -> None:
        """Removes the shard, which turned out to be damaged."""
        for path in self._whole(shard):
            path.unlink(missing_ok=True)

    def _whole(self, shard: RemoteShard) -> list[Path]:
        """Where the shard is or would be. Without a checksum, any version of its size will do."""
        name = _url_hash(shard.url)
        if shard.sha256:
            return [self.folder / f"{name}-{shard.sha256[:16]}.tar"]
        return list(self.folder.glob(f"{name}-*.tar"))

    def _open_whole(self, shard: RemoteShard) -> int | None:
        for path in self._whole(shard):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            state = os.fstat(descriptor)
            if state.st_nlink and state.st_size == shard.num_bytes:  # no link: evicted before the lock was ours
                if time.time() - state.st_mtime > _FRESH:
                    with suppress(PermissionError):  # a file of another user: its own reads note its use
                        os.utime(descriptor)
                return descriptor
            os.close(descriptor)
            if state.st_nlink:  # another version, or cut by somebody else
                path.unlink(missing_ok=True)
        return None

    def _download(self, shard: RemoteShard, *, wait: bool) -> int | None:
        """The descriptor; None when another process is at it, or, with `wait`, was at it and has ended."""
        part = self.folder / f"{_url_hash(shard.url)}-{shard.num_bytes}.part"
        descriptor, mine = self._reserve(shard, part)
        if descriptor is None:
            return None
        try:
            if not mine:
                if wait:
                    fcntl.flock(descriptor, fcntl.LOCK_SH)  # until its writer ends, which is bounded
                os.close(descriptor)
                return None
            sha256 = download(shard, descriptor, patience=self.patience)
            os.fsync(descriptor)
            with self._locked() as folder:
                part.rename(self.folder / f"{_url_hash(shard.url)}-{sha256[:16]}.tar")
                os.fsync(folder)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _reserve(self, shard: RemoteShard, part: Path) -> tuple[int | None, bool]:
        """Opens the `.part`, with room for the rest, and says whether it could be locked; None for a whole shard."""
        deadline = time.monotonic() + self.patience.longest
        while True:
            with self._locked():
                if any(path.exists() for path in self._whole(shard)):
                    return None, False
                too_large = shard.num_bytes > self.max_bytes
                if not too_large and (part.exists() or self._make_room(shard.num_bytes)):
                    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                    return descriptor, _try_lock(descriptor)
                others = any(self._files())  # all of them in use: they may go
            if too_large or not others or time.monotonic() > deadline:
                allowed = f"{self.max_bytes / 1e9:g} GB"
                raise DataError(
                    f"{shard.url} has {shard.num_bytes:,} bytes, for which the cache {self.folder} has no room",
                    f"free disk space, or allow more than {allowed}: data.cache_gb=..., or {BOUND_VARIABLE}=...",
                )
            time.sleep(_POLL)

    def _make_room(self, needed: int) -> bool:
        """Evicts what was not used for longest until `needed` bytes fit; whether they do. Shards in use stay."""
        files = sorted(self._files(), key=lambda file: file[2])
        used = sum(num_bytes for _, num_bytes, _ in files)
        for path, num_bytes, _ in files:
            if self._fits(used, needed):
                break
            if _remove_unused(path):
                used -= num_bytes
        return self._fits(used, needed)

    def _fits(self, used: int, needed: int) -> bool:
        return used + needed <= self.max_bytes and needed <= shutil.disk_usage(self.folder).free

    def _files(self) -> Iterator[tuple[Path, int, float]]:
        """Path, bytes and time of last use; a `.part` counts as what it will be."""
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    state = path.stat()
                    size = int(path.stem.rpartition("-")[2]) if path.suffix == ".part" else state.st_size
                    yield path, size, state.st_mtime

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """A full disk or a folder without rights becomes a `DataError` that says so."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"the cache of remote shards {self.folder} cannot be used: {error}",
                f"free disk space, or name another folder: data.cache_folder=DIR, or {FOLDER_VARIABLE}=DIR",
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The folder, locked: one process at a time counts, evicts, begins and ends a file. Gives its descriptor."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def set_cache(*, folder: str | None, gigabytes: float | None) -> None:
    """What a config says about the cache: it wins over the environment, here and in the processes started from here."""
    if folder is not None:
        os.environ[FOLDER_VARIABLE] = folder
    if gigabytes is not None:
        os.environ[BOUND_VARIABLE] = str(gigabytes)


def default_folder() -> Path:
    """Where shards are kept: MAEDISTILL_CACHE, else `maedistill/shards` in the user's cache."""
    own = os.environ.get(FOLDER_VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own).expanduser().absolute() if own else Path(cache, "maedistill", "shards")


def default_bound() -> int:
    """Bytes that the cache may take: MAEDISTILL_CACHE_GB, else 100 GB."""
    text = os.environ.get(BOUND_VARIABLE, str(DEFAULT_GB))
    try:
        bound = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        bound = 0
    if bound <= 0:
        raise ConfigError(f"{BOUND_VARIABLE} is {text!r}", "give the gigabytes that the cache may take, e.g. 100")
    return bound


def _remove_unused(path: Path) -> bool:
    """Removes a file that no process has locked; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # for an exclusive lock NFS wants a writer
    except FileNotFoundError:
        return True
    try:
        if _try_lock(descriptor):
            path.unlink(missing_ok=True)
            return True
        return False
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _url_hash(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()
