"""The cache of remote shards: whole files in one folder, shared by all processes of a machine, never above its bound.

    URL, size, checksum -> ShardCache.open -> descriptor of the whole, verified shard

    URLHASH-SIZE.part     arriving; its writer holds an exclusive lock on it, the others wait for that lock
    URLHASH-CONTENT.tar   whole; a reader holds a shared lock, and only what nobody has locked is evicted

The locks are on the files themselves and end with their process, however it ends: a killed download leaves a `.part`
that the next one continues, and nothing else. A file's time of change says when it was last used.
"""

import fcntl
import hashlib
import itertools
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from maedistill.data.remote import Patience, TransferError, open_stream, retry
from maedistill.errors import ConfigError, DataError

FOLDER_VARIABLE, BOUND_VARIABLE = "MAEDISTILL_CACHE", "MAEDISTILL_CACHE_GB"
DEFAULT_GB = 100.0  # gigabytes (1e9 bytes)
_CHANGED = (
    "bring the shard that the index was made of, or make its index again: one that was scanned lies in the user's "
    "cache, in maedistill/index, and may be removed"
)
_POLL = 0.05  # seconds between two looks for room
_FRESH = 1.0  # seconds for which a use need not be noted again
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteShard:
    """What must arrive. Without an index the checksum is not known; the first scan finds it."""

    url: str
    num_bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class ShardCache:
    """A folder with at most `max_bytes` of shards. It holds no state, so it may be pickled, forked and threaded."""

    folder: Path = field(default_factory=lambda: default_folder())
    max_bytes: int = field(default_factory=lambda: default_bound())
    patience: Patience = field(default_factory=Patience)

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
                raise DataError(
                    f"{shard.url} has {shard.num_bytes:,} bytes, for which the cache {self.folder} has no room",
                    f"free disk space, or allow more than {self.max_bytes / 1e9:g} GB: {BOUND_VARIABLE}=...",
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
            if path.suffix in (".part", ".tar"):
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
                f"free disk space, or name another folder: {FOLDER_VARIABLE}=DIR",
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


class ReadAhead:
    """Fetches shards into the cache in the background, nearest first, in one thread.

    Loader workers that want the same shards share the work: each takes the first that nobody is at.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._todo: list[RemoteShard] = []
        self._thread: threading.Thread | None = None

    def want(self, shards: Sequence[RemoteShard]) -> None:
        """Replaces the list of what to fetch; returns at once."""
        self._todo = list(shards)
        if self._todo and not (self._thread and self._thread.is_alive()):
            self._thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while todo := self._todo:
            shard, self._todo = todo[0], todo[1:]
            try:
                self._cache.fetch(shard)
            except DataError as error:  # the reader that needs this shard tries again and raises
                _log.warning("read-ahead: %s", error.cause)


def download(shard: RemoteShard, descriptor: int, *, patience: Patience) -> str:
    """Fills a file with the shard, going on where it ends if the bytes can be proved right; returns their sha256.

    Raises `DataError` naming the URL, `OSError` if the file cannot be written.
    """
    tag, num_bytes = None, shard.num_bytes
    wrong: set[str] = set()  # checksums that arrived
    if shard.sha256 is None:
        os.ftruncate(descriptor, 0)  # nothing could tell whether an older beginning fits

    def attempt() -> str:
        nonlocal tag
        start = os.fstat(descriptor).st_size
        if start > num_bytes or (start and not (shard.sha256 or tag)):
            os.ftruncate(descriptor, start := 0)
        if start < num_bytes:
            with open_stream(shard.url, start=start, tag=tag, timeout=patience.timeout) as stream:
                tag = stream.tag
                if stream.size not in (None, num_bytes):
                    what = f"the file there has {stream.size:,} bytes instead of {num_bytes:,}"
                    raise TransferError(what, final=True, remedy=_CHANGED)
                _write(descriptor, stream.chunks, start=stream.start, num_bytes=num_bytes)
        sha256 = _hash(descriptor)
        if sha256 != (shard.sha256 or sha256):
            os.ftruncate(descriptor, 0)
            again = sha256 in wrong
            wrong.add(sha256)
            what = "its checksum is not the one in the index" + ", twice in the same way" * again
            raise TransferError(what, final=again, remedy=_CHANGED)
        return sha256

    return retry(attempt, shard.url, patience=patience)


def largest_window(shard_bytes: Sequence[int], cache_bytes: int) -> int:
    """How many shards `data.window_shards` may be: all if the set fits the cache, else so many that any two windows do.

    One window is read while the next arrives. 0 where not even two shards fit.
    """
    if sum(shard_bytes) <= cache_bytes:
        return len(shard_bytes)
    totals = itertools.accumulate(sorted(shard_bytes, reverse=True))
    return sum(total <= cache_bytes for total in totals) // 2


def check_window(shard_bytes: Sequence[int], *, window: int | None, cache_bytes: int) -> None:
    """Raises `ConfigError` if training on remote shards would download them again and again. window: None for all."""
    largest = largest_window(shard_bytes, cache_bytes)
    if (window or len(shard_bytes)) <= largest:
        return
    whole = sum(shard_bytes) / 1e9
    least = sum(sorted(shard_bytes)[-2:]) / 1e9
    remedy = f"set data.window_shards={largest}, or {BOUND_VARIABLE}={_round_up(whole)}"
    if not largest:
        remedy = f"set data.window_shards=1 and {BOUND_VARIABLE}={_round_up(least)} or more"
    raise ConfigError(
        f"data.window_shards is {window or 'null'}, but of {len(shard_bytes):,} remote shards ({whole:.3g} GB) only "
        f"{largest} at a time fit twice into the cache of {cache_bytes / 1e9:g} GB",
        remedy,
    )


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


def _write(descriptor: int, chunks: Iterator[bytes], *, start: int, num_bytes: int) -> None:
    """Writes what arrives from byte `start` on; what came before a failure stays for the next attempt."""
    os.ftruncate(descriptor, start)
    position = start
    for chunk in chunks:
        if position + len(chunk) > num_bytes:
            os.ftruncate(descriptor, 0)
            raise TransferError(f"more than the expected {num_bytes:,} bytes came")
        view = memoryview(chunk)
        while view:
            written = os.pwrite(descriptor, view, position)
            view, position = view[written:], position + written
    if position < num_bytes:
        raise TransferError(f"it ended after {position:,} of {num_bytes:,} bytes")


def _hash(descriptor: int) -> str:
    """Hex sha256 of the whole file; the next read begins at its beginning."""
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
    return sha256


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


def _round_up(gigabytes: float) -> str:
    return f"{math.ceil(gigabytes * 1000) / 1000:g}"
