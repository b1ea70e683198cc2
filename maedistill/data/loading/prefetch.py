"""Prefetch batches to a GPU: copy the next one from pinned memory, on a side stream, while the current step runs.

    loader -> batch n + 1 -> copy on the side stream ..........................> ahead
              batch n     -> the step's stream waits for its copy, and no more -> training

Two rules keep this fast and correct. The step's stream must wait for batch n before the copy of batch n + 1 is issued;
otherwise it would wait for both. And `record_stream` must tell the allocator that the step's stream uses batch n;
otherwise its memory, which belongs to the side stream, could be reused for batch n + 2 while the step still reads it.
"""

from collections.abc import Iterator
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor


class Movable(Protocol):
    """An object whose fields are tensors, which move to a device together."""

    def to(self, device: torch.device) -> Self:
        """Copy the tensors to a device without waiting for the copies."""


M = TypeVar("M", bound=Movable | tuple[Tensor, ...])


def on_device(batches: Iterator[M], device: torch.device) -> Iterator[M]:
    """Move the batches to `device`: to a GPU one batch ahead, which overlaps only if the host memory is pinned."""
    if device.type == "cuda":
        return DevicePrefetch(batches, device)
    return (_moved(batch, device) for batch in batches)


class DevicePrefetch(Generic[M]):
    """The same batches in the same order, on a GPU. A batch is returned once the copy of the next one has been issued.

    An error of `batches` is raised in its place, after all batches before it. The worker processes of `batches` end
    when this object is freed or closed.
    """

    def __init__(self, batches: Iterator[M], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._side = torch.cuda.Stream(device)
        self._ahead: M | Exception | None = None  # None: no batch was requested yet

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
        """Drop the batches, so that their worker processes end. The iteration is over."""
        self._batches, self._ahead = iter(()), None

    def _take(self) -> M | Exception:
        """Issue the copy of the next batch and return it, or the exception instead: `StopIteration` at the end."""
        try:
            batch = next(self._batches)
        except Exception as error:  # raised later, by the `__next__` for this batch
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
