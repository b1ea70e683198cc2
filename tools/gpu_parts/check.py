"""What a part is given: where it may work, how long, on which device; and the verdicts it hands back."""

import math
import os
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_parts.rows import FAIL, MEASURED, OK, SKIPPED, Row, RowFile

ROOT = Path(__file__).resolve().parent.parent.parent  # of the checkout


@dataclass
class Check:
    """The circumstances of one part.

    out: folder of the results, for logs; work: folder for data and runs, thrown away at the end. until: the time when
    the part is killed, in seconds since the epoch.
    """

    part: str
    tiny: bool
    out: Path
    work: Path
    until: float

    @cached_property
    def device(self) -> torch.device:
        """The card, or the CPU where there is none."""
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def on_card(self) -> bool:
        """Whether there is a card."""
        return self.device.type == "cuda"

    @property
    def cores(self) -> int:
        """CPU cores that this process may use."""
        return len(os.sched_getaffinity(0))

    @property
    def left(self) -> float:
        """Seconds that are left, a few kept for the way out."""
        return self.until - time.time() - 3

    @property
    def rows(self) -> RowFile:
        """All parts' rows so far."""
        return RowFile(self.out / "rows.jsonl")

    def log(self, name: str) -> Path:
        """Name a file for details."""
        return self.out / "logs" / name

    def verdict(self, check: str, good: bool, figure: str = "", **values: float) -> None:
        """Note that something is right or wrong."""
        self._note(check, OK if good else FAIL, figure, values=values)

    def measured(self, check: str, figure: str, *, goal: str = "", **values: float) -> None:
        """Note a figure."""
        self._note(check, MEASURED, figure, goal=goal, values=values)

    def skipped(self, check: str, reason: str) -> None:
        """Note what was left out, and why."""
        self._note(check, SKIPPED, reason)

    def close(self, check: str, found: Tensor, expected: Tensor, *, bound: float) -> None:
        """Compare two tensors, whole, by the norm of their difference."""
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
