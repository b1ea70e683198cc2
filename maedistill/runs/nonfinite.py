"""Updates whose loss or gradient is not finite: counted, listed with their samples; too many in a row end the run.

The engine skips such updates (training/engine.py). Whether it did is a flag on the device. It is read one step late, so
that the host never waits for the device.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from maedistill.errors import NumericsError
from maedistill.escaping import say
from maedistill.processes import distributed
from maedistill.runs.progress import Progress
from maedistill.runs.records import AppendOnlyFile


class LateFlags:
    """Read a flag of each step one step late. All ranks read the same, because reduced gradients are equal."""

    def __init__(self) -> None:
        self._last: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def push(self, step: int, flag: Tensor) -> list[tuple[int, bool]]:
        """Take the flag of `step`, bool [] on its device; return what `read` returns of the step before."""
        known = self.read()
        if flag.is_cuda:
            copy = torch.empty((), dtype=torch.bool, pin_memory=True)
            done = torch.cuda.Event(blocking=True)  # otherwise the host busy-waits on a core
            copy.copy_(flag, non_blocking=True)
            done.record()
            self._last = step, copy, done
        else:
            self._last = step, flag, None
        return known

    def read(self) -> list[tuple[int, bool]]:
        """Return the step whose flag is not known yet, with its flag, if there is one."""
        if self._last is None:
            return []
        (step, flag, done), self._last = self._last, None
        if done is not None:
            done.synchronize()
        return [(step, bool(flag))]


class NonfinitePolicy:
    """Apply `engine.max_nonfinite`, here `most`.

    path: the file that lists the samples of skipped updates. sample_names: from a step, counted from 0, to their names.
    """

    def __init__(self, path: Path, *, most: int, sample_names: Callable[[int], list[str]]) -> None:
        self.lines, self.most, self.sample_names = AppendOnlyFile(path, unique=True), most, sample_names
        self._flags = LateFlags()

    def check(self, progress: Progress, skipped: Tensor, *, now: bool) -> None:
        """Count the update just made if it was skipped, bool [] on its device; it may be known one call later.

        now: wait for the flag. Raises NumericsError after more than `most` in a row.
        """
        self._count(progress, self._flags.push(progress.step - 1, skipped))
        if now:
            self.count_last(progress)

    def count_last(self, progress: Progress) -> None:
        """Count the last update too, as a checkpoint needs. Raises what `check` raises."""
        self._count(progress, self._flags.read())

    def _count(self, progress: Progress, flags: list[tuple[int, bool]]) -> None:
        for step, is_skipped in flags:
            if not is_skipped:
                progress.nonfinite_in_a_row = 0
                continue
            progress.nonfinite += 1
            progress.nonfinite_in_a_row += 1
            if distributed.is_main():
                self.lines.append(json.dumps({"step": step + 1, "samples": self.sample_names(step)}))
                say(f"step {step + 1} is not applied: its loss or gradient is not finite", error=True)
            if progress.nonfinite_in_a_row > self.most:
                raise NumericsError(
                    f"the loss or the gradient of step {step + 1} is not finite, {progress.nonfinite_in_a_row} in a "
                    f"row, where engine.max_nonfinite allows {self.most}; {self.lines.path} names its samples",
                    "look at them, or start another run= with a lower optim.base_lr or optim.clip=1; no checkpoint "
                    "has such numbers",
                )
