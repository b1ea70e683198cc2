"""One image's bytes by sample id: one positioned read from its shard.

ShardIndex, sample id -> ShardReader.read -> bytes
"""

import os
from collections import OrderedDict
from typing import Any

from maedistill.data.index import ShardIndex
from maedistill.errors import DataError

MOST_OPEN = 64  # shards; many systems allow 1,024 open files, to be shared by all loader workers' sockets and pipes


class ShardReader:
    """Reads images of an index; shards are opened when first needed and the longest unused is closed.

    Works in a forked process (positioned reads share no file offset) and after pickling (nothing open travels).
    Not for several threads at once: one of them could close what another reads.
    """

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, longest unused first

    def read(self, i: int) -> bytes:
        """The encoded bytes of sample `i`. Raises `DataError` if its shard has gone or changed its size."""
        shard = self.index.shard_of(i)
        size, offset = int(self.index.sizes[i]), int(self.index.offsets[i])
        data = os.pread(self._descriptor(shard), size, offset)
        while len(data) < size:  # a read may be short, e.g. on a network disk or beyond 2 GiB
            more = os.pread(self._descriptor(shard), size - len(data), offset + len(data))
            if not more:
                raise self._changed(shard)
            data += more
        return data

    def close(self) -> None:
        """Closes all shards; the next read opens what it needs."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) == MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        try:
            descriptor = os.open(self.index.shards[shard], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError as error:
            raise DataError(f"{self.index.shards[shard]} is gone", "put the shard back, then start again") from error
        self._open[shard] = descriptor
        if os.fstat(descriptor).st_size != self.index.shard_bytes[shard]:
            raise self._changed(shard)
        return descriptor

    def _changed(self, shard: int) -> DataError:
        return DataError(
            f"{self.index.shards[shard]} has changed its size since its index was made",
            "copy the shard again; do not write shards while a run reads them",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["index"])

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()
