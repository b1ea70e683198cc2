"""How images come from a loader worker to the training process: through memory that both share and use again.

    worker: crops -> a slot -> BatchHandle: slot number, labels, ... -> torch's queue -> BatchHandle.open, .pin_memory

For every tensor of every batch, torch's own way makes a file in /dev/shm, whose pages the kernel has to clear and to
map each time: 0.1 ms per crop of 224 px, a tenth of its decoding. Slots belong to no file system, so the size of
/dev/shm does not matter to them, and they are gone with the last process that has them.

    C slots   m images in a batch   s crop size
"""

import itertools
import mmap
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from maedistill.data.loading.batch import Batch

_known: "WeakValueDictionary[int, SharedBatchBuffers]" = WeakValueDictionary()  # those of this process, by number
_numbers = itertools.count()


class SharedBatchBuffers:
    """Room for `count` batches of images, shared with every process that is forked later."""

    def __init__(self, count: int, *, batch: int, size: int) -> None:
        memory = mmap.mmap(-1, count * batch * size * size * 3)
        shape = (count, batch, size, size, 3)
        self._images = torch.frombuffer(memory, dtype=torch.uint8).view(shape).permute(0, 1, 4, 2, 3)
        self._number = next(_numbers)
        _known[self._number] = self

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, slot: int) -> Tensor:
        """uint8 [m, 3, s, s], channels last in memory."""
        return self._images[slot]

    def __reduce__(self) -> tuple[Any, ...]:
        """What a worker sends is the number; the process that made the slots finds them by it."""
        return _slots_of, (self._number,)


@dataclass(frozen=True)
class BatchHandle:
    """A batch on its way, its images in a slot until they are taken out. The rest is small and travels as it is."""

    slots: SharedBatchBuffers
    slot: int
    positions: np.ndarray  # int64 [m], as the next two
    labels: np.ndarray
    samples: np.ndarray
    bad: tuple[str, ...]

    def open(self) -> Batch:
        """The batch where it lies: its images are the slot, which is filled anew once the next batch is asked for."""
        return self._batch(self.slots[self.slot])

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; torch's loader calls this when it feeds a GPU."""
        return self.open().pin_memory()

    def _batch(self, images: Tensor) -> Batch:
        positions, labels, samples = map(torch.from_numpy, (self.positions, self.labels, self.samples))
        return Batch(images, positions, labels, samples, self.bad)


def _slots_of(number: int) -> SharedBatchBuffers:
    return _known[number]
