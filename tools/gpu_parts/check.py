"""The interface of a part: its folders, time limit and device, and the functions that record its results."""

import math
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_parts.rows import FAIL, MEASURED, OK, SKIPPED, Row, RowFile
from gpu_parts.runner import log_folder

ROOT = Path(__file__).resolve().parent.parent.parent  # of the checkout
TIME_UP = "its time was up"
MEMORY_FULL = "the card's memory is full"


@dataclass
class Check:
    """The context of one part.

    out: folder of the results. work: folder for data, runs and logs, deleted at the end; the logs are collected in OUT.
    until: the time when the part is killed, in seconds since the epoch.
    """

    part: str
    tiny: bool
    out: Path
    work: Path
    until: float

    @cached_property
    def device(self) -> torch.device:
        """Return the first GPU, or the CPU if there is none."""
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def on_card(self) -> bool:
        """Return whether there is a GPU."""
        return self.device.type == "cuda"

    @property
    def cores(self) -> int:
        """Return the number of CPU cores that this process may use."""
        return len(os.sched_getaffinity(0))

    @property
    def left(self) -> float:
        """Return the seconds that are left, minus 3 s that are reserved for the exit."""
        return self.until - time.time() - 3

    @property
    def rows(self) -> RowFile:
        """Return the file of the rows that all parts have written so far."""
        return RowFile(self.out / "rows.jsonl")

    def log(self, name: str) -> Path:
        """Return the path of a log file for details."""
        return log_folder(self.work, self.part) / name

    def verdict(self, check: str, good: bool, figure: str = "", **values: float) -> None:
        """Record a check that passed or failed."""
        self._note(check, OK if good else FAIL, figure, values=values)

    def measured(self, check: str, figure: str, *, goal: str = "", **values: float) -> None:
        """Record a measured figure."""
        self._note(check, MEASURED, figure, goal=goal, values=values)

    def skipped(self, check: str, reason: str) -> None:
        """Record a check that was left out, and the reason."""
        self._note(check, SKIPPED, reason)

    @contextmanager
    def guarded(self, check: str) -> Iterator[None]:
        """Record an error within the block as a failure; what comes after the block runs all the same.

        A card whose memory is too small for a check is no failure.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            traceback.print_exc()
            torch.cuda.empty_cache()
            self.skipped(check, MEMORY_FULL)
        except Exception as error:
            traceback.print_exc()
            self.verdict(f"{check}: runs", False, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")

    def close(self, check: str, found: Tensor, expected: Tensor, *, bound: float) -> None:
        """Record whether two tensors agree: the norm of their difference over that of `expected` is at most `bound`."""
        found, expected = (tensor.detach().double().cpu() for tensor in (found, expected))
        distance = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
        good = math.isfinite(distance) and distance <= bound
        self.verdict(check, good, f"relative difference {distance:.1e}, bound {bound:g}", difference=distance)

    def wait(self) -> None:
        """Wait for the device."""
        if self.on_card:
            torch.cuda.synchronize()

    def _note(self, check: str, verdict: str, figure: str, **more: Any) -> None:
        """Write a row."""
        self.rows.append(Row(self.part, check, verdict, figure, **more))
