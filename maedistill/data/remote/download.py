"""Read remote files: retry with growing waits, resume a shard after a failure, verify its checksum.

    RemoteShard, open file -> download -> sha256         pattern -> list_urls -> URLs
                              URL -> file_size -> bytes         URL -> read_small -> content

All raise a DataError that names the URL and the last failure. An attempt fails if the server sends nothing, or less
than `urls.SLOWEST`; a merely slow server is tolerated.
"""

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from maedistill.data.remote.urls import WEB, DeniedError, MissingError, TransferError, ask_store, open_stream
from maedistill.errors import ConfigError, DataError
from maedistill.escaping import warn

_CHANGED = (
    "bring the shard that the index was made of, or make its index again: one that was scanned lies in the user's "
    "cache, in maedistill/index, and may be removed"
)
Result = TypeVar("Result")


@dataclass(frozen=True)
class RetryPolicy:
    """The limits on retries, and on the time that a download may take."""

    tries: int = 6
    timeout: float = 30.0  # seconds to connect, and to wait for the next bytes
    wait: float = 1.0  # maximum seconds before the second try; doubles each time
    max_seconds: float = 3600.0  # for all tries together


@dataclass(frozen=True)
class RemoteShard:
    """A shard to download. Without an index its checksum is unknown until the first scan."""

    url: str
    num_bytes: int
    sha256: str | None = None


def download(shard: RemoteShard, descriptor: int, *, policy: RetryPolicy) -> str:
    """Download the shard into a file and return its sha256. Resume a partial file only if it can be verified.

    Raise `DataError` naming the URL, `OSError` if the file cannot be written.
    """
    tag, num_bytes = None, shard.num_bytes
    wrong: set[str] = set()  # wrong checksums so far
    if shard.sha256 is None:
        os.ftruncate(descriptor, 0)  # without a checksum, an older partial file cannot be verified

    def attempt(timeout: float) -> str:
        nonlocal tag
        start = os.fstat(descriptor).st_size
        if start > num_bytes or (start and not (shard.sha256 or tag)):
            os.ftruncate(descriptor, start := 0)
        if start < num_bytes:
            with open_stream(shard.url, start=start, tag=tag, timeout=timeout) as stream:
                tag = stream.tag
                if stream.size not in (None, num_bytes):
                    size = f"{stream.size:,} bytes instead of {num_bytes:,}"
                    raise TransferError(f"the file there has {size}", final=True, remedy=_CHANGED)
                _write(descriptor, stream.chunks, start=stream.start, num_bytes=num_bytes)
        os.lseek(descriptor, 0, os.SEEK_SET)
        with open(descriptor, "rb", closefd=False) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.lseek(descriptor, 0, os.SEEK_SET)
        if sha256 != (shard.sha256 or sha256):
            os.ftruncate(descriptor, 0)
            again = sha256 in wrong
            wrong.add(sha256)
            message = "its checksum is not the one in the index" + ", twice in the same way" * again
            raise TransferError(message, final=again, remedy=_CHANGED)
        return sha256

    return retry(attempt, shard.url, policy=policy)


def retry(attempt: Callable[[float], Result], url: str, *, policy: RetryPolicy | None = None) -> Result:
    """Call `attempt(timeout)` until it succeeds, with exponential backoff and jitter, or raise `DataError`."""
    policy = policy or RetryPolicy()
    began, chance = time.monotonic(), random.SystemRandom()  # not the global generator, which training uses
    for number in range(1, policy.tries + 1):
        try:
            return attempt(policy.timeout)
        except TransferError as error:
            pause = policy.wait * 2 ** (number - 1) * chance.uniform(0.5, 1)
            spent = time.monotonic() - began
            if error.final or number == policy.tries or spent + pause > policy.max_seconds:
                tries = f"{number} {'try' if number == 1 else 'tries'} in {spent:.0f} s"
                raise DataError(f"{url} could not be read ({tries}); last error: {error}", error.remedy) from error
            warn(f"{url}: {error}; trying again in {pause:.1f} s")
            time.sleep(pause)
    raise AssertionError("a policy allows at least one try")


def list_urls(pattern: str) -> list[str]:
    """Return the URLs in a store that match a glob pattern. Raise `ConfigError` for the web, which has no listings."""
    scheme, _, path = pattern.partition("://")
    if scheme in WEB:
        raise ConfigError(
            f"{pattern!r} has a wildcard, and web servers do not list files", "write a range, as train-{0000..1023}.tar"
        )
    files = retry(lambda timeout: ask_store(scheme, "glob", path, timeout=timeout), pattern)
    return [f"{scheme}://{file}" for file in files]


def file_size(url: str) -> int:
    """Return the size of a remote file in bytes. Raise `DataError` if it is missing or its size is not stated."""

    def attempt(timeout: float) -> int:
        with open_stream(url, last=0, timeout=timeout) as stream:
            if stream.size is None:
                raise TransferError("the server does not tell the file's size", final=True)
            return stream.size

    return retry(attempt, url)


def read_small(url: str, *, most: int = 1 << 30) -> bytes | None:
    """Read a small file, e.g. an index; None if it is missing, or, with a warning, if access to it is denied.

    Raise `DataError` on failure, or above `most` bytes.
    """

    def attempt(timeout: float) -> bytes | None:
        data = bytearray()
        try:
            with open_stream(url, timeout=timeout) as stream:
                for chunk in stream.chunks:
                    data += chunk
                    if len(data) > most:
                        raise TransferError(f"the file has more than {most:,} bytes", final=True)
        except MissingError as error:
            if isinstance(error, DeniedError):
                warn(f"{url} is treated as missing: {error}; if it is there, allow this user to read it")
            return None
        if stream.size is not None and len(data) != stream.size:
            raise TransferError(f"it ended after {len(data):,} of {stream.size:,} bytes")
        return bytes(data)

    return retry(attempt, url)


def _write(descriptor: int, chunks: Iterator[bytes], *, start: int, num_bytes: int) -> None:
    """Write the chunks from byte `start` on. Bytes written before a failure are kept for the next attempt."""
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
