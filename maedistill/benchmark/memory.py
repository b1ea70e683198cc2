"""The peak memory of a piece of work beyond what was in use before: the allocator's record on a GPU, a count on a CPU.

A CPU's allocator keeps no such record, and the size of a process says little about one step. So every tensor that an
operation returns is counted until its storage is freed. Memory used only inside a kernel is not counted.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Return the largest number of bytes of tensors made by `work` that are alive at the same time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _LiveBytes() as live:
        work()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """A counter that adds a storage when an operation first returns it, and subtracts it when it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and _address(leaf) not in given | self._alive:  # else a view, or in place
                self._add(leaf.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._alive.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._take_off, address, size).atexit = False

    def _take_off(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.now -= size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
