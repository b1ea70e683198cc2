"""Remote shards before they are needed: fetched in the background, and so many at a time that the cache holds them.

    shards of this window and the next -> ReadAhead -> cache          sizes of all shards -> largest_window

Two windows of the order must fit into the cache: the one that is read, and the one that arrives.
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
    remedy = f"set data.window_shards={largest}, or data.cache_gb={_round_up(whole)}"
    if not largest:
        remedy = f"set data.window_shards=1 and data.cache_gb={_round_up(least)} or more"
    raise ConfigError(
        f"data.window_shards is {window or 'null'}, but of {len(shard_bytes):,} remote shards ({whole:.3g} GB) only "
        f"{largest} at a time fit twice into the cache of {cache_bytes / 1e9:g} GB",
        remedy,
    )


def _round_up(gigabytes: float) -> str:
    return f"{math.ceil(gigabytes * 1000) / 1000:g}"
