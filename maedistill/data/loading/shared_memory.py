"""Pass images from loader workers to the training process through shared memory buffers that are reused.

    worker: crops -> a slot -> BatchHandle: slot number, labels, ... -> torch's queue -> BatchHandle.open, .pin_memory

torch itself creates a file in /dev/shm for every tensor of every batch, and the kernel has to clear and map its pages
each time: 0.1 ms per crop of 224 px, a tenth of the decoding time. Slots belong to no file system, so they do not
depend on the size of /dev/shm, and the kernel frees them with the last process that uses them.

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

_known: "WeakValueDictionary[int, SharedBatchBuffers]" = WeakValueDictionary()  # the buffers of this process, by number
_numbers = itertools.count()


class SharedBatchBuffers:
    """Slots for `count` batches of images, in memory shared with every process that is forked later."""

    def __init__(self, count: int, *, batch: int, size: int) -> None:
        memory = mmap.mmap(-1, count * batch * size * size * 3)
        shape = (count, batch, size, size, 3)
        self._images = torch.frombuffer(memory, dtype=torch.uint8).view(shape).permute(0, 1, 4, 2, 3)
        self._number = next(_numbers)
        _known[self._number] = self

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, slot: int) -> Tensor:
        """Return the images of a slot: uint8 [m, 3, s, s], channels last in memory."""
        return self._images[slot]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the number, by which the process that created the slots finds them again."""
        return _slots_of, (self._number,)


@dataclass(frozen=True)
class BatchHandle:
    """A batch in transit: its images stay in a slot, while the other fields are small and are pickled."""

    slots: SharedBatchBuffers
    slot: int
    positions: np.ndarray  # int64 [m], as the next two
    labels: np.ndarray
    samples: np.ndarray
    bad: tuple[str, ...]

    def open(self) -> Batch:
        """Return the batch without a copy: its images are the slot, overwritten after the next batch is taken."""
        return self._batch(self.slots[self.slot])

    def pin_memory(self) -> Batch:
        """Copy the batch to pinned memory; DataLoader calls this before copies to a GPU."""
        return self.open().pin_memory()

    def _batch(self, images: Tensor) -> Batch:
        positions, labels, samples = map(torch.from_numpy, (self.positions, self.labels, self.samples))
        return Batch(images, positions, labels, samples, self.bad)


def _slots_of(number: int) -> SharedBatchBuffers:
    return _known[number]
