"""Read one image's bytes by sample id, with one positioned read from its shard or the cached copy of a remote shard.

ShardIndex, sample id -> ShardReader.read -> bytes
"""

import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from maedistill.data.images.decode import BadImage
from maedistill.data.images.shared_images import KeptImages
from maedistill.data.remote.cache import ShardCache
from maedistill.data.remote.download import RemoteShard
from maedistill.data.remote.read_ahead import ReadAhead
from maedistill.data.remote.urls import is_url
from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.tars import BLOCK, is_header_of
from maedistill.errors import DataError

MOST_OPEN = 64  # shards; many systems allow 1,024 open files, and the workers' sockets and pipes need some of them
MOST_BAD = 16  # after this many bad samples in a row, the whole data set is considered bad
Image = TypeVar("Image")


class ShardReader:
    """Reads images of an index. It opens shards on first use and closes the least recently used one.

    It works in a forked process: positioned reads share no file offset. It is not thread-safe: one thread could close a
    file that another reads. A remote shard is reopened for each read, which takes microseconds, so that no reader keeps
    the cache from evicting a shard that it no longer needs.

    The watchdog may set the callback `on_read`, which gets each sample id before it is read, and whether the sample's
    shard may have to be downloaded first. `kept` is where `read_first` keeps decoded images, if it is set.
    """

    def __init__(self, index: ShardIndex) -> None:
        self.index, self._remote = index, [is_url(shard) for shard in index.shards]
        self.is_remote = any(self._remote)
        self._cache = ShardCache() if self.is_remote else None
        self.longest_fetch = self._cache.policy.max_seconds if self._cache else 0.0  # seconds per shard
        self._ahead = ReadAhead(self._cache) if self._cache else None
        self.on_read: Callable[[int, bool], None] = lambda sample, fetching: None
        self.kept: KeptImages | None = None
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recently used first

    def read(self, i: int) -> bytes:
        """Return the encoded bytes of sample `i`. Raise `DataError` if its shard is missing, changed or unreadable."""
        shard = self.index.shard_of(i)
        is_remote = self._remote[shard]
        try:
            self.on_read(i, is_remote)
            if not is_remote:
                return self._read(self._descriptor(shard), i, shard)
            assert self._cache is not None
            descriptor = self._cache.open(self._remote_shard(shard))
            try:
                self.on_read(i, False)
                return self._read(descriptor, i, shard)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DataError(
                f"{self.index.sample_name(i)} cannot be read: {error.strerror}",
                "check the permissions, and the disk or network drive that the shard is on, then start again",
            ) from error

    def decoded(self, i: int, decode: Callable[[bytes], Image]) -> Image:
        """Return sample `i`, decoded. Raises what `read` and `decode` raise."""
        return decode(self.read(i))

    def read_first(self, candidates: Iterable[int], decode: Callable[[bytes], Image]) -> tuple[Image, int, list[str]]:
        """Return the first candidate that can be decoded, its id, and a message for each one before it.

        Raise `DataError` after `MOST_BAD` samples for which `decode` raises `BadImage`.
        """
        bad: list[str] = []
        for sample in itertools.islice(candidates, MOST_BAD):
            try:
                return self._kept_or_decoded(sample, decode), sample, bad
            except BadImage as error:
                bad.append(f"{self.index.sample_name(sample)}: {error}")
        raise DataError(
            f"{MOST_BAD} samples in a row could not be decoded, the last is {bad[-1]}",
            "check the shards with maedistill shards --verify",
        )

    def _kept_or_decoded(self, i: int, decode: Callable[[bytes], Any]) -> Any:
        if self.kept is None:
            return self.decoded(i, decode)
        image = self.kept.get(i)
        if image is None:
            image = self.decoded(i, decode)
            self.kept.put(i, image)
        else:
            self.on_read(i, False)
        return image

    def read_ahead(self, shards: Sequence[int]) -> None:
        """Prefetch remote shards into the cache in the background. `shards` are needed next, in this order."""
        if self._ahead:
            self._ahead.want([self._remote_shard(shard) for shard in shards])

    def _remote_shard(self, shard: int) -> RemoteShard:
        return RemoteShard(self.index.shards[shard], self.index.shard_bytes[shard], self.index.shard_sha256[shard])

    def _read(self, descriptor: int, i: int, shard: int) -> bytes:
        size, offset = int(self.index.sizes[i]), int(self.index.offsets[i])
        if not is_header_of(os.pread(descriptor, BLOCK, offset - BLOCK), self.index.key(i)):
            raise self._changed(shard, "holds other samples than its index says")
        data = os.pread(descriptor, size, offset)
        while len(data) < size:  # reads may be short, e.g. on a network disk or above 2 GiB
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                raise self._changed(shard, "has become shorter since its index was made")
            data += more
        return data

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) == MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        try:
            descriptor = os.open(self.index.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise DataError(f"{self.index.shards[shard]} is missing", "put the shard back, then start again") from error
        if os.fstat(descriptor).st_size != self.index.shard_bytes[shard]:
            os.close(descriptor)
            raise self._changed(shard, "has changed its size since its index was made")
        self._open[shard] = descriptor
        return descriptor

    def _changed(self, shard: int, how: str) -> DataError:
        return DataError(
            f"{self.index.shards[shard]} {how}", "copy the shard again; do not write shards while a run reads them"
        )

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():  # it is absent if the environment's cache is invalid
            os.close(descriptor)
