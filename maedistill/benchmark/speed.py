"""The speed of work that other processes share in: by the clock on the wall, and by the time that cores gave to it.

{path: a generator of counts} -> measure -> {path: Speed}
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

from maedistill.benchmark.timing import Rates

Work = Callable[[], Iterator[int]]  # one round of a path: how many were made, part by part; the first part warms up
_SCHEDSTAT = "/proc/{pid}/schedstat"


@dataclass(frozen=True)
class Speed:
    """How many a second one path makes, by either clock."""

    wall: Rates
    per_core: Rates


def measure(paths: Mapping[str, Work], *, rounds: int) -> dict[str, Speed]:
    """The speed of all paths, run in turn as `interleave` does, each round in the opposite order."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for number in range(1 + rounds):
        for name in list(paths) if number % 2 else reversed(paths):
            speed = speed_of(paths[name]())
            if number > 0:
                measured[name].append(speed)
    return {name: Speed(*map(Rates, zip(*speeds, strict=True))) for name, speeds in measured.items()}


def speed_of(parts: Iterator[int]) -> tuple[float, float]:
    """How many a second, by either clock, from when the first part was there until the last was."""
    next(parts)
    made, start = 0, (perf_counter(), _core_seconds())
    for part in parts:
        made, end = made + part, (perf_counter(), _core_seconds())
    return made / (end[0] - start[0]), made / (end[1] - start[1])


def _core_seconds() -> float:
    """What this process and its living children have had of the cores."""
    return process_time() + sum(_core_seconds_of(child.pid) for child in multiprocessing.active_children())


def _core_seconds_of(pid: int) -> float:
    """In nanoseconds where the kernel says it (Linux), elsewhere in ticks of 10 ms."""
    try:
        return int(Path(_SCHEDSTAT.format(pid=pid)).read_text().split()[0]) / 1e9
    except FileNotFoundError:
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
