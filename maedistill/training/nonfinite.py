"""Updates whose loss or gradient is not finite, detected one step late so that the host never waits for the device.

The engine skips such updates (see engine.py). This file counts them and reports them to the loop, which continues or
stops according to `engine.nonfinite`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class NonfiniteUpdates:
    """Counter of non-finite updates. All ranks agree, because reduced gradients are equal on all ranks."""

    total: int = 0  # in the run so far
    in_a_row: int = 0
    _last: "tuple[int, Tensor, torch.cuda.Event | None] | None" = field(default=None, repr=False)

    def note(self, step: int, broken: Tensor, *, now: bool) -> list[int]:
        """Record whether the update of `step` was non-finite (bool [] on its device); return newly known such steps.

        now: wait for this flag too; otherwise the next call returns it.
        """
        known = self._settle()
        if broken.is_cuda:
            verdict = torch.empty((), dtype=torch.bool, pin_memory=True)
            done = torch.cuda.Event(blocking=True)  # otherwise the host busy-waits on a core
            verdict.copy_(broken, non_blocking=True)
            done.record()
        else:
            verdict, done = broken, None
        self._last = (step, verdict, done)
        return known + self._settle() if now else known

    def _settle(self) -> list[int]:
        if self._last is None:
            return []
        (step, verdict, done), self._last = self._last, None
        if done is not None:
            done.synchronize()
        if not verdict:
            self.in_a_row = 0
            return []
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        return [step]
