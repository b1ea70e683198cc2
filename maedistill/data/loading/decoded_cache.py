"""Decide whether the decoded images of a training set are kept in memory, which the ranks of a machine share.

    RandomCrops, data.keep_decoded -> room_for -> Room -> keep_decoded: crops.reader.kept

A few images tell how much memory all of them take. If that is at most a share of the memory that is free, they are kept
as they are decoded in the first epoch, and never take more than the share.
"""

import math
import platform
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from maedistill.data.images.decode import BadImage, open_image
from maedistill.data.images.shared_images import KeptImages, table_bytes
from maedistill.data.loading.dataset import open_reader
from maedistill.data.loading.loader import RandomCrops
from maedistill.errors import ConfigError, UserError
from maedistill.escaping import warn
from maedistill.machine import concurrent_runs, free_memory
from maedistill.processes import distributed

LOOKED_AT = 64  # images
SHARES = {"auto": (1 / 4, "a quarter"), True: (1 / 2, "half")}  # of the free memory, by data.keep_decoded
Setting = bool | Literal["auto"]


@dataclass(frozen=True)
class Room:
    """The bytes that the decoded images would take, and the most that they may, of the runs that share the machine."""

    images: int
    needed: int
    limit: int
    setting: Setting
    runs: int

    @property
    def is_enough(self) -> bool:
        """Return whether the images are kept."""
        return self.needed <= self.limit

    def line(self) -> str:
        """Describe what is kept and why. Raise `ConfigError` if it is demanded and cannot be."""
        limit = f"{self.limit / 1e6:,.0f} MB, {SHARES[self.setting][1]} of the free memory"
        limit += f", shared by {self.runs} runs" if self.runs > 1 else ""
        images = f"{self.images:,} images take about {self.needed / 1e6:,.0f} MB"
        if self.is_enough:
            return f"decoded  once and kept in memory: {images} of at most {limit}"
        if self.setting is True:
            raise ConfigError(
                f"data.keep_decoded=true: {images} decoded, more than {limit}",
                "give the job more memory, start fewer at a time (maedistill study --jobs), make smaller images "
                "(maedistill shards --shorter-side N), or use data.keep_decoded=auto",
            )
        return f"decoded  each time: {images}, more than {limit}"


def room_for(crops: RandomCrops, setting: Setting) -> Room | None:
    """Look at some images and at the free memory; None if nothing is to be kept."""
    if setting is False:
        return None
    reader, sizes, count = open_reader(crops.index), [], crops.order.num_images  # its files are closed at the end
    for sample in _few_samples(crops):
        try:
            found = reader.decoded(sample, lambda data: open_image(data).size)
        except BadImage:
            continue
        sizes.append(3 * math.prod(found) if isinstance(found, tuple) else found.numel())
    needed = table_bytes(len(crops.index)) + count * sum(sizes) // max(1, len(sizes))
    limit, runs = SHARES[setting][0] * free_memory(), concurrent_runs()
    return Room(count, needed, int(limit / runs), setting, runs)


def keep_decoded(crops: RandomCrops, setting: Setting) -> str | None:
    """Let the crops' reader keep decoded images, in memory shared with the ranks of this machine. Collective.

    The first rank of each machine decides. Return what rank 0 decided, as a line. Raise `ConfigError` on all ranks if
    one machine has no room for what is demanded.
    """
    address: tuple[str, str] | UserError | None = None
    line = None
    if distributed.local_rank() == 0:
        try:
            if (room := room_for(crops, setting)) is not None:
                line = room.line()
                if room.is_enough:
                    # not all of the limit, because a ulimit may bound what is mapped; no estimate is so far off
                    crops.reader.kept = KeptImages.create(len(crops.index), min(room.limit, 2 * room.needed))
                    address = crops.reader.kept.address
        except UserError as error:
            address = error
        except OSError as error:  # a sandbox may forbid such memory
            line = f"decoded  each time: the system provides no shared memory ({error})"
            if setting is True:
                address = ConfigError(f"data.keep_decoded=true: {line}", "use data.keep_decoded=auto")
    found = distributed.gather_objects((platform.node(), address, line))
    for host, other, _ in found:
        if isinstance(other, UserError):
            raise other
        if other is not None and host == platform.node() and crops.reader.kept is None:
            try:
                crops.reader.kept = KeptImages.open(other, len(crops.index))
            except OSError as error:
                warn(f"this rank decodes each image every time: it cannot open the shared images ({error})")
    return found[0][-1]


def _few_samples(crops: RandomCrops) -> list[int]:
    """Return samples spread over the set; of remote shards only of the one that is read first."""
    index, order = crops.index, crops.order
    if not crops.reader.is_remote:
        return order.ids_at(_spread(0, order.num_images)).tolist()
    shard = index.shard_of(int(order.samples(torch.tensor([0]))))
    return _spread(int(index.starts[shard]), int(index.starts[shard + 1])).tolist()


def _spread(first: int, end: int) -> Tensor:
    """Return numbers in [first, end), evenly spread: int64 [at most LOOKED_AT]."""
    return torch.arange(first, end, -(-(end - first) // LOOKED_AT))
