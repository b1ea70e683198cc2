"""The counters of a run, what adds to them, and the counts that end it: bad samples, updates that are not finite.

The engine skips updates whose loss or gradient is not finite (see training/engine.py). Whether it did is a flag on the
device. It is read one step late, so that the host never waits for the device.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from maedistill.config.schema import EngineConfig, RunConfig
from maedistill.errors import DataError, NumericsError
from maedistill.processes import distributed
from maedistill.runs.records import AppendOnlyFile

_MIN_SAMPLES = 10_000  # max_bad_fraction is taken of at least this many samples, so one bad image cannot end a run


@dataclass
class Progress:
    """How far a run is: exactly what a checkpoint keeps of its loop in state.json. All ranks hold the same values."""

    step: int = 0  # steps done
    bad_samples: int = 0  # samples replaced because they could not be decoded
    nonfinite: int = 0  # updates not applied because their loss or gradient was not finite
    nonfinite_in_a_row: int = 0
    trained_seconds: float = 0.0  # without saving, evaluating and drawing

    def state(self) -> dict[str, int | float]:
        """Return the values that a checkpoint keeps."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], *, checkpoints: Path) -> Self:
        """Restore the values of a checkpoint. Raises DataError if it has other keys or types than this version's."""
        own = cls().state()
        differing = sorted(name for name in own.keys() | state if type(state.get(name)) is not type(own.get(name)))
        if differing:
            raise DataError(
                f"the newest checkpoint in {checkpoints} is of another version: its state differs in "
                f"{', '.join(differing)}",
                "continue with the version that the run began with, or use another run=",
            )
        return cls(**state)


class BadSampleLog:
    """Counts the samples that were replaced, and applies `data.max_bad_fraction`. path: the file that lists them."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.lines = AppendOnlyFile(path, unique=True)
        self.max_fraction, self.global_batch = config.data.max_bad_fraction, config.optim.global_batch
        self._new: list[str] = []

    def add(self, lines: Iterable[str]) -> None:
        """Remember bad samples of this rank, each as a line `NAME: why`."""
        self._new += lines

    def count(self, progress: Progress) -> None:
        """Write and count the new bad samples of all ranks. Collective. Raises DataError if they are too many."""
        new = [line for lines in distributed.gather_objects(self._new) for line in lines]
        if new and distributed.is_main():
            self.lines.append(*sorted(new))
        self._new = []
        progress.bad_samples += len(new)
        if progress.bad_samples > self.max_fraction * max(_MIN_SAMPLES, progress.step * self.global_batch):
            raise DataError(
                f"{progress.bad_samples} bad samples, more than data.max_bad_fraction={self.max_fraction:g} allows",
                f"see {self.lines.path}; repair the shards or raise the limit",
            )


class LateFlags:
    """Read a flag of each step one step late. All ranks read the same, because reduced gradients are equal."""

    def __init__(self) -> None:
        self._last: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def push(self, step: int, flag: Tensor, *, now: bool) -> list[tuple[int, bool]]:
        """Take the flag of `step`, bool [] on its device. Return the steps whose flags are now known, with the flags.

        now: wait for this flag too; otherwise the next call returns it.
        """
        readable = self._read()
        if flag.is_cuda:
            copy = torch.empty((), dtype=torch.bool, pin_memory=True)
            done = torch.cuda.Event(blocking=True)  # otherwise the host busy-waits on a core
            copy.copy_(flag, non_blocking=True)
            done.record()
            self._last = step, copy, done
        else:
            self._last = step, flag, None
        return readable + self._read() if now else readable

    def _read(self) -> list[tuple[int, bool]]:
        if self._last is None:
            return []
        (step, flag, done), self._last = self._last, None
        if done is not None:
            done.synchronize()
        return [(step, bool(flag))]


class NonfinitePolicy:
    """Apply `engine.nonfinite` and `engine.max_nonfinite`. path: the file that lists the samples of skipped updates."""

    def __init__(self, path: Path, settings: EngineConfig) -> None:
        self.lines, self.settings = AppendOnlyFile(path, unique=True), settings
        self._flags = LateFlags()

    def check(
        self, progress: Progress, skipped: Tensor, *, now: bool, sample_names: Callable[[int], list[str]]
    ) -> None:
        """Count the update just made if it was skipped, bool [] on its device; it may be known one call later.

        now: wait for the flag. sample_names: from a step, counted from 0, to the names of its samples. Raises
        NumericsError if the settings say that the run ends.
        """
        last = None
        for step, is_skipped in self._flags.push(progress.step - 1, skipped, now=now):
            progress.nonfinite += is_skipped
            progress.nonfinite_in_a_row = progress.nonfinite_in_a_row + 1 if is_skipped else 0
            if is_skipped:
                last = step + 1
                if distributed.is_main():
                    self.lines.append(json.dumps({"step": last, "samples": sample_names(step)}))
                    text = f"step {last} is not applied: its loss or gradient is not finite"
                    print(text, file=sys.stderr, flush=True)
        too_many = self.settings.nonfinite == "stop" or progress.nonfinite_in_a_row > self.settings.max_nonfinite
        if last is not None and too_many:
            raise NumericsError(
                f"the loss or the gradient of step {last} is not finite, {progress.nonfinite_in_a_row} in a row "
                f"(engine.nonfinite={self.settings.nonfinite}); {self.lines.path} names its samples",
                "look at them, or start another run= with a lower optim.base_lr or optim.clip=1; no checkpoint has "
                "such numbers",
            )
