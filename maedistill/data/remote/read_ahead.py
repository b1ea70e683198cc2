"""Prefetch remote shards in the background: shards of this window and the next -> ReadAhead -> cache."""

import threading
from collections.abc import Sequence

from maedistill.data.remote.cache import ShardCache
from maedistill.data.remote.download import RemoteShard
from maedistill.errors import DataError
from maedistill.escaping import warn


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
                warn(f"read-ahead: {error.cause}")
