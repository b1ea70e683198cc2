"""Batches for a GPU, each copied while the step before runs: from pinned memory, on a stream of their own, one ahead.

    loader -> batch n + 1 -> copy on the side stream ..........................> ahead
              batch n     -> the step's stream waits for its copy, and no more -> training

Two orders keep this exact. The step's stream is told to wait for batch n before the copy of batch n + 1 is begun, or it
would wait for both. And the allocator is told that the step's stream uses batch n (`record_stream`), or its memory,
which belongs to the side stream, could take batch n + 2 while the step still reads it.
"""

from collections.abc import Iterator
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor


class Movable(Protocol):
    """Tensors that travel together, as fields of one object."""

    def to(self, device: torch.device) -> Self:
        """The same on a device, by copies that wait for nobody."""


M = TypeVar("M", bound=Movable | tuple[Tensor, ...])


def on_device(batches: Iterator[M], device: torch.device) -> Iterator[M]:
    """Bring the batches to `device`: to a GPU one ahead, from memory that must be pinned for that to cost no time."""
    if device.type == "cuda":
        return DevicePrefetch(batches, device)
    return (_moved(batch, device) for batch in batches)


class DevicePrefetch(Generic[M]):
    """The same batches in the same order, on a GPU. A batch comes once the one after it is on its way.

    An error of `batches` is raised where it would be without this: after all batches that came before it. The processes
    behind `batches` end with this object, as they do with `batches`, or at `close`.
    """

    def __init__(self, batches: Iterator[M], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._side = torch.cuda.Stream(device)
        self._ahead: M | Exception | None = None  # None: nothing was asked for yet

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> M:
        batch = self._take() if self._ahead is None else self._ahead
        if isinstance(batch, Exception):
            self.close()
            raise batch
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._side)
        for tensor in _tensors(batch):
            if tensor.device.type == self._device.type:
                tensor.record_stream(current)
        self._ahead = self._take()
        return batch

    def close(self) -> None:
        """Lets go of the batches, whose processes then end. There is nothing more to come."""
        self._batches, self._ahead = iter(()), None

    def _take(self) -> M | Exception:
        """The next batch on its way to the GPU, or why there is none: `StopIteration` at the end."""
        try:
            batch = next(self._batches)
        except Exception as error:  # not hidden: raised when its turn comes
            return error
        with torch.cuda.stream(self._side):
            return _moved(batch, self._device)


def _moved(batch: M, device: torch.device) -> M:
    """Copy a batch to a device without waiting for the copies."""
    if isinstance(batch, tuple):
        return tuple(part.to(device, non_blocking=True) for part in batch)
    return batch.to(device)


def _tensors(batch: Any) -> list[Tensor]:
    """List the tensors of a batch."""
    parts = batch if isinstance(batch, tuple) else vars(batch).values()
    return [part for part in parts if isinstance(part, Tensor)]
