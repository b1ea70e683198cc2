"""Updates whose loss or gradient is not finite: noticed one step late, so that the host never waits for the device.

The engine applies no such update (see engine.py). Here they are counted and handed to the loop, which follows
`engine.nonfinite`: go on or stop.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class NonfiniteUpdates:
    """How many there were. Equal on all ranks, since a gradient is."""

    total: int = 0  # in the run so far
    in_a_row: int = 0
    _last: "tuple[int, Tensor, torch.cuda.Event | None] | None" = field(default=None, repr=False)

    def note(self, step: int, broken: Tensor, *, now: bool) -> list[int]:
        """Takes the verdict on the update of `step` (bool [] on its device); returns the broken steps that are known.

        now: wait for this verdict too; otherwise it is known at the next call.
        """
        known = self._settle()
        if broken.is_cuda:
            verdict = torch.empty((), dtype=torch.bool, pin_memory=True)
            done = torch.cuda.Event(blocking=True)  # else the host spins a core while it waits
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
