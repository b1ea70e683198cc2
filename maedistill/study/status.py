"""One line that says what the running steps are doing, from the end of their logs.

On a terminal the line is rewritten in place. In a pipe it is printed at most every 10 seconds.
"""

import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from maedistill.escaping import shown
from maedistill.runs.history import duration

_PIPE_SECONDS, _TERMINAL_SECONDS = 10.0, 0.5
_TAIL = 4096  # bytes of a log that hold its last progress line
_PROGRESS = re.compile(
    r"step (?P<step>\d+/\d+)\s.*?loss (?P<loss>\S+) .*?eta (?P<left>\S+)"
)  # runs/metrics.py writes it


@dataclass(frozen=True)
class RunningStep:
    """A step in progress. place: its number, `3/14`."""

    place: str
    name: str
    log: Path
    start: float  # of time.monotonic()


class StatusLine:
    """The last line of the output, and lines printed above it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._rewrites = self._stream.isatty()
        self._next = time.monotonic() + (0 if self._rewrites else _PIPE_SECONDS)
        self._shown = ""

    def update(self, steps: Sequence[RunningStep]) -> None:
        """Show what the steps are doing, if it is time to."""
        now = time.monotonic()
        if now < self._next or not steps:
            return
        self._next = now + (_TERMINAL_SECONDS if self._rewrites else _PIPE_SECONDS)
        if not self._rewrites:
            self._write(f"{_describe(steps, now=now)}\n")
            return
        width = shutil.get_terminal_size().columns - 1
        whole, short = (_describe(steps, now=now, short=short) for short in (False, True))
        text = whole if len(whole) <= width else short[:width]
        if text != self._shown:
            self._write(f"\r{text}\x1b[K")
            self._shown = text

    def print(self, *lines: str) -> None:
        """Print lines that stay. The status line disappears until the next update."""
        self.clear()
        self._write("".join(f"{shown(line)}\n" for line in lines))

    def clear(self) -> None:
        """Remove the status line from a terminal."""
        if self._shown:
            self._write("\r\x1b[K")
            self._shown = ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _describe(steps: Sequence[RunningStep], *, now: float, short: bool = False) -> str:
    return shown("  |  ".join(_describe_one(step, now=now, short=short) for step in steps))


def _describe_one(step: RunningStep, *, now: float, short: bool) -> str:
    """Return `3/14 dmae/seed_0/pretrain: step 120/625, loss 0.7490, 2m08s left`; without progress, the time so far."""
    progress = read_progress(step.log)
    if progress is None:
        return f"{step.place} {step.name}: {duration(now - step.start)}"
    done, loss, left = progress
    if short:
        return f"{step.place} {step.name.replace('/seed_0/', ' ')} {done} {left}"
    return f"{step.place} {step.name}: step {done}, loss {loss}, {left} left"


def read_progress(log: Path) -> tuple[str, str, str] | None:
    """Return step, loss and time left of the last progress line at the end of a log; None without one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            tail = file.read().decode(errors="replace")
    except FileNotFoundError:
        return None
    found = [match for line in tail.splitlines() if (match := _PROGRESS.search(line))]
    return (found[-1]["step"], found[-1]["loss"], found[-1]["left"]) if found else None
