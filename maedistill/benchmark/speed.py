"""The speed of work that uses child processes: by wall-clock time and by core time.

{path: a generator of counts} -> measure -> {path: Speed}
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

from maedistill.benchmark.timing import Rates

Work = Callable[[], Iterator[int]]  # one round of a path: the number of items of each part; the first part warms up
_SCHEDSTAT = "/proc/{pid}/schedstat"


@dataclass(frozen=True)
class Speed:
    """Items per second of one path: per second of wall-clock time and per core-second."""

    wall: Rates
    per_core: Rates


def measure(paths: Mapping[str, Work], *, rounds: int) -> dict[str, Speed]:
    """Measure all paths in turn, as `interleave` does; each round runs in the opposite order of the previous one."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for number in range(1 + rounds):
        for name in list(paths) if number % 2 else reversed(paths):
            speed = speed_of(paths[name]())
            if number > 0:
                measured[name].append(speed)
    return {name: Speed(*map(Rates, zip(*speeds, strict=True))) for name, speeds in measured.items()}


def speed_of(parts: Iterator[int]) -> tuple[float, float]:
    """Return items per wall-clock second and per core-second, from the end of the first part to that of the last."""
    next(parts)
    made, start = 0, (perf_counter(), _core_seconds())
    for part in parts:
        made, end = made + part, (perf_counter(), _core_seconds())
    return made / (end[0] - start[0]), made / (end[1] - start[1])


def _core_seconds() -> float:
    """Return the core-seconds that this process and its living children have used."""
    return process_time() + sum(_core_seconds_of(child.pid) for child in multiprocessing.active_children())


def _core_seconds_of(pid: int) -> float:
    """Return the core-seconds of a process: in nanosecond steps if the kernel has schedstat, else in ticks of 10 ms."""
    try:
        return int(Path(_SCHEDSTAT.format(pid=pid)).read_text().split()[0]) / 1e9
    except FileNotFoundError:
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
