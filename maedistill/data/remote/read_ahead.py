"""Prefetch remote shards in the background, and limit the shuffle window to what the cache can hold.

    shards of this window and the next -> ReadAhead -> cache          sizes of all shards -> largest_window

Two windows of the order must fit into the cache: the one being read and the one being downloaded.
"""

import itertools
import logging
import math
import threading
from collections.abc import Sequence

from maedistill.data.remote.cache import ShardCache
from maedistill.data.remote.download import RemoteShard
from maedistill.errors import ConfigError, DataError

_log = logging.getLogger(__name__)


class ReadAhead:
    """Downloads shards into the cache in one background thread, in the order given.

    Loader workers that need the same shards share the work: each skips a shard that another is downloading.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._queue: list[RemoteShard] = []
        self._thread: threading.Thread | None = None

    def want(self, shards: Sequence[RemoteShard]) -> None:
        """Replace the list of shards to download. Return at once."""
        self._queue = list(shards)
        if self._queue and not (self._thread and self._thread.is_alive()):
            self._thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while queue := self._queue:
            shard, self._queue = queue[0], queue[1:]
            try:
                self._cache.fetch(shard)
            except DataError as error:  # the reader that needs this shard retries and raises
                _log.warning("read-ahead: %s", error.cause)


def largest_window(shard_bytes: Sequence[int], cache_bytes: int) -> int:
    """Return the largest `data.shuffle_window`: all shards if the cache can hold them, else as many as fit twice.

    One window is read while the next one is downloaded. The result is 0 if not even two shards fit.
    """
    if sum(shard_bytes) <= cache_bytes:
        return len(shard_bytes)
    totals = itertools.accumulate(sorted(shard_bytes, reverse=True))
    return sum(total <= cache_bytes for total in totals) // 2


def check_window(shard_bytes: Sequence[int], *, window: int | None, cache_bytes: int) -> None:
    """Raise `ConfigError` if training would download remote shards repeatedly. window: in shards; None for all."""
    largest = largest_window(shard_bytes, cache_bytes)
    if (window or len(shard_bytes)) <= largest:
        return
    needed = sum(shard_bytes) if largest else sum(sorted(shard_bytes)[-2:])
    gigabytes = f"{math.ceil(needed / 1e6) / 1000:g}"
    remedy = f"set data.shuffle_window={largest}, or data.cache_gb={gigabytes}"
    if not largest:
        remedy = f"set data.shuffle_window=1 and data.cache_gb={gigabytes} or more"
    raise ConfigError(
        f"data.shuffle_window is {window or 'null'}, but of {len(shard_bytes):,} remote shards "
        f"({sum(shard_bytes) / 1e9:.3g} GB) only {largest} at a time fit twice into the cache of "
        f"{cache_bytes / 1e9:g} GB",
        remedy,
    )
