"""One batch of images, and its way from a loader worker to the device.

    worker: crops -> a slot -> BatchHandle: slot number, labels, ... -> torch's queue -> Batch whose images are the slot
    on_device: batch n + 1 -> copy on a side stream ...........................> ahead
               batch n     -> the step's stream waits for its copy, and no more -> training

torch itself creates a file in /dev/shm for every tensor of every batch, and the kernel has to clear and map its pages
each time: 0.1 ms per crop of 224 px, a tenth of the decoding time. Slots belong to no file system, so they do not
depend on the size of /dev/shm, and the kernel frees them with the last process that uses them.

    m micro-batch   b batch   s crop size   C slots
"""

import itertools
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

_slots: "WeakValueDictionary[int, SharedSlots]" = WeakValueDictionary()  # by number
_numbers = itertools.count()


class Batch(NamedTuple):
    """One micro-batch, and a message for each sample that could not be decoded (`bad`)."""

    images: Tensor  # uint8 [m, 3, s, s]; on the host channels last in memory, on the device planar
    positions: Tensor  # int64 [m]
    labels: Tensor  # int64 [m], of the samples actually read; -1 for unlabelled samples
    samples: Tensor  # int64 [m], stays on the host
    bad: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device, without waiting; the images become planar."""
        images, positions, labels = (part.to(device, non_blocking=True) for part in self[:3])
        return Batch(images.contiguous(), positions, labels, self.samples, self.bad)


B = TypeVar("B", Batch, tuple[Tensor, Tensor, Tensor])


class SharedSlots:
    """C = `count` slots for batches of images, in memory shared with every process that is forked later.

    like: an image, whose shape, dtype and order in memory all of them have. block: number of positions between the
    starts of two consecutive batches. Batch j uses slot j mod C.
    """

    def __init__(self, count: int, *, batch: int, like: Tensor, block: int) -> None:
        memory = torch.frombuffer(mmap.mmap(-1, count * batch * like.nbytes), dtype=like.dtype)
        strides = (batch * like.numel(), like.numel(), *like.stride())
        self.images = memory.as_strided((count, batch, *like.shape), strides)  # [C, b, *image]
        self.block, self.number = block, next(_numbers)
        _slots[self.number] = self

    def slot_of(self, position: int) -> int:
        """Return the slot of the batch that begins at this position."""
        return position // self.block % len(self.images)


@dataclass(frozen=True)
class BatchHandle:
    """A batch on its way from a worker, whose images are a slot. It is unpickled as `build(images, *rest)`."""

    slots: SharedSlots
    slot: int
    build: Callable[..., Any]
    rest: tuple[Any, ...]  # what the batch holds besides images

    def __reduce__(self) -> tuple[Any, ...]:
        # a tensor would become a file in /dev/shm
        rest = tuple(part.numpy() if isinstance(part, Tensor) else part for part in self.rest)
        return _open_batch, (self.build, self.slots.number, self.slot, rest)


def _open_batch(build: Callable[..., Any], number: int, slot: int, rest: tuple[Any, ...]) -> Any:
    parts = (torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in rest)
    return build(_slots[number].images[slot], *parts)


def on_device(batches: Iterator[B], device: torch.device) -> Iterator[B]:
    """Move the batches to `device`: to a GPU one batch ahead, which overlaps only if the host memory is pinned."""
    if device.type == "cuda":
        return prefetched(batches, device)
    return (_moved(batch, device) for batch in batches)


def prefetched(batches: Iterator[B], device: torch.device) -> Iterator[B]:
    """Yield the same batches, on a GPU, each once the copy of the next one has been issued.

    An error of `batches` is raised in its place, after all batches before it. The worker processes of `batches` end
    when this generator is freed or closed.
    """
    side = torch.cuda.Stream(device)

    def take() -> B | Exception:
        """Issue the copy of the next batch and return it, or the exception instead: `StopIteration` at the end."""
        try:
            batch = next(batches)
        except Exception as error:  # raised later, in the place of this batch
            return error
        with torch.cuda.stream(side):
            return _moved(batch, device)

    batch = take()
    while not isinstance(batch, Exception):
        # Wait for batch n before the copy of batch n + 1 is issued; otherwise the step would wait for both.
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        # Tell the allocator that the step uses batch n. Its memory belongs to the side stream, and could otherwise be
        # reused for batch n + 2 while the step still reads it.
        for part in batch:
            if isinstance(part, Tensor) and part.device.type == device.type:
                part.record_stream(current)
        ahead = take()
        yield batch
        batch = ahead
    if not isinstance(batch, StopIteration):
        raise batch


def _moved(batch: Any, device: torch.device) -> Any:
    """Copy a `Batch` or a tuple of tensors to a device without waiting for the copies."""
    if isinstance(batch, Batch):
        return batch.to(device)
    return tuple(part.to(device, non_blocking=True) for part in batch)
