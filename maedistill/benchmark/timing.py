"""Speeds measured side by side: every round runs every path once, so that other load slows all paths alike.

    {name: path} -> interleave -> {name: Rates} -> spread, ratio: median and quartiles over the rounds

A path is a generator function that yields the number of images of each part of its work. The first part warms up: the
clocks start after it and stop after the last part. Ratios are taken within each round, then their median is reported.
"""

import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import clock_gettime, perf_counter, process_time

import numpy as np
import torch

from maedistill.evaluation.latency import seconds_of
from maedistill.processes import distributed

Work = Callable[[], Iterator[int]]  # one round of a path


@dataclass(frozen=True)
class Spread:
    """The median of some measurements and the range that holds the middle half of them."""

    median: float
    low: float  # first quartile
    high: float  # third quartile

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Rates:
    """Images per second of one path, round by round: per second of wall-clock time, and per core-second."""

    wall: tuple[float, ...]
    per_core: tuple[float, ...]


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles of measurements."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Return how many times as fast one path is as another, from their rates in the same rounds."""
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])


def interleave(paths: dict[str, Work], *, rounds: int, warm_up: int = 1) -> dict[str, Rates]:
    """Run all paths in turn: `warm_up` unmeasured rounds, then `rounds` measured ones. Every round reverses the order.

    A path must have finished a part when it yields: on a GPU, it waits for the device itself.
    """
    assert rounds >= 1
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for number in range(warm_up + rounds):
        for name in list(paths) if number % 2 else reversed(paths):
            rates = measure(paths[name]())
            if number >= warm_up:
                measured[name].append(rates)
    return {name: Rates(*zip(*rates, strict=True)) for name, rates in measured.items()}


def measure(parts: Iterator[int]) -> tuple[float, float]:
    """Return images per wall-clock second and per core-second, from the end of the first part to that of the last."""
    next(parts)
    images, start = 0, (perf_counter(), _core_seconds())
    for part in parts:
        images, end = images + part, (perf_counter(), _core_seconds())
    return images / (end[0] - start[0]), images / (end[1] - start[1])


def repeated(work: Callable[[], object], device: torch.device, *, images: int, seconds: float) -> Work:
    """Return the path that repeats `work`, which takes `images` images at a time, for about `seconds`. Collective."""
    work()  # the first call is slower
    repeats = distributed.broadcast_object(max(1, math.ceil(seconds / seconds_of(work, device))))

    def path() -> Iterator[int]:
        yield 0
        seconds_of(work, device, repeats=repeats)
        yield repeats * images

    return path


def _core_seconds() -> float:
    """Return the core-seconds that this process and its living children have used."""
    children = (child.pid for child in multiprocessing.active_children() if child.pid is not None)
    clocks = (~pid << 3 | 2 for pid in children)  # as clock_getcpuclockid(3) does
    return process_time() + sum(map(clock_gettime, clocks))
