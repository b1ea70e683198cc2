"""Download one remote shard into a local file: retry with growing waits, resume after a failure, verify the checksum.

    RemoteShard, open file -> download -> sha256, or a DataError that names the URL and the last failure

An attempt fails if the server sends nothing, or less than `streams.SLOWEST`; a merely slow server is tolerated.
"""

import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from maedistill.data.remote.streams import TransferError, open_stream
from maedistill.errors import DataError

_CHANGED = (
    "bring the shard that the index was made of, or make its index again: one that was scanned lies in the user's "
    "cache, in maedistill/index, and may be removed"
)
_log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class RetryPolicy:
    """The limits on retries, and on the time that a download may take."""

    tries: int = 6
    timeout: float = 30.0  # seconds to connect, and to wait for the next bytes
    wait: float = 1.0  # maximum seconds before the second try; doubles each time
    longest: float = 3600.0  # seconds for all tries together


@dataclass(frozen=True)
class RemoteShard:
    """A shard to download. Without an index its checksum is unknown until the first scan."""

    url: str
    num_bytes: int
    sha256: str | None = None


def download(shard: RemoteShard, descriptor: int, *, patience: RetryPolicy) -> str:
    """Download the shard into a file and return its sha256. Resume a partial file only if it can be verified.

    Raise `DataError` naming the URL, `OSError` if the file cannot be written.
    """
    tag, num_bytes = None, shard.num_bytes
    wrong: set[str] = set()  # wrong checksums so far
    if shard.sha256 is None:
        os.ftruncate(descriptor, 0)  # without a checksum, an older partial file cannot be verified

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


def retry(attempt: Callable[[], Result], url: str, *, patience: RetryPolicy) -> Result:
    """Call `attempt` until it succeeds, with exponential backoff and jitter. Raise `DataError` after the last try."""
    began, chance = time.monotonic(), random.SystemRandom()  # not the global generator, which training uses
    for number in range(1, patience.tries + 1):
        try:
            return attempt()
        except TransferError as error:
            pause = patience.wait * 2 ** (number - 1) * chance.uniform(0.5, 1)
            spent = time.monotonic() - began
            if error.final or number == patience.tries or spent + pause > patience.longest:
                tries = f"{number} {'try' if number == 1 else 'tries'} in {spent:.0f} s"
                raise DataError(f"{url} could not be read ({tries}); at the last: {error}", error.remedy) from error
            _log.warning("%s: %s; trying again in %.1f s", url, error, pause)
            time.sleep(pause)
    raise AssertionError("patience allows at least one try")


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


def _hash(descriptor: int) -> str:
    """Return the hex sha256 of the whole file, and rewind the file."""
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
    return sha256
