"""The weight of a distillation term over time: a pure function of the epoch, and its table for a whole run.

weight |        ______________
       |       /              |
     0 |______/               |______
        start  +warmup       stop     epochs
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """A term's weight after its warm-up, and when the term is active; times in epochs. stop_epoch None: to the end."""

    weight: float
    start_epoch: float = 0.0
    warmup_epochs: float = 0.0
    stop_epoch: float | None = None

    def at(self, epoch: float) -> float:
        """Return the weight in the step that begins after `epoch` epochs."""
        if epoch < self.start_epoch or (self.stop_epoch is not None and epoch >= self.stop_epoch):
            return 0.0
        if epoch >= self.start_epoch + self.warmup_epochs:
            return self.weight
        return self.weight * (epoch - self.start_epoch) / self.warmup_epochs

    @property
    def changes(self) -> bool:
        """Return whether the weight changes over time."""
        return bool(self.start_epoch or self.warmup_epochs) or self.stop_epoch is not None

    def describe(self) -> str:
        """Return a summary: `9 from epoch 5, warm-up 20, to epoch 100`."""
        start = f" from epoch {self.start_epoch:g}" if self.start_epoch else ""
        warmup = f", warm-up {self.warmup_epochs:g}" if self.warmup_epochs else ""
        stop = f", to epoch {self.stop_epoch:g}" if self.stop_epoch is not None else ""
        return f"{self.weight:g}{start}{warmup}{stop}"


def weight_table(schedules: Sequence[Schedule], *, steps: int, epoch_at: Callable[[int], float]) -> Tensor:
    """Return the weight of each schedule at each step: float32 [steps, schedules].

    A compiled step takes a row of this table, on the device, as input: it neither waits for the host nor recompiles.
    """
    rows = [[schedule.at(epoch_at(step)) for schedule in schedules] for step in range(steps)]
    return torch.tensor(rows, dtype=torch.float32).view(steps, len(schedules))
