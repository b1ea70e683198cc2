"""Interleaved measurement of speeds: every round runs every path once, so that other load slows all paths alike.

    {name: path} -> interleave -> {name: Rates} -> Rates, ratio: median and quartiles over the rounds

A path does some work and returns the number of images it processed. Ratios are taken within each round, then the median
of these ratios is reported.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


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
    """Images per second of one path, round by round."""

    rounds: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """Return median and quartiles over the rounds."""
        return spread(self.rounds)


def spread(values: tuple[float, ...]) -> Spread:
    """Return median and quartiles of measurements."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high)


def ratio(ours: Rates, theirs: Rates) -> Spread:
    """Return how many times as fast one path is as another; both must come from the same `interleave`."""
    return spread(tuple(one / other for one, other in zip(ours.rounds, theirs.rounds, strict=True)))


def interleave(paths: Mapping[str, Callable[[], int]], *, rounds: int, warm_up: int = 1) -> dict[str, Rates]:
    """Run all paths in turn: `warm_up` unmeasured rounds, then `rounds` measured ones. Every round reverses the order.

    A path must have finished its work when it returns: on a GPU, it waits for the device itself.
    """
    assert rounds >= 1
    measured: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(warm_up + rounds):
        for name in list(paths) if number % 2 else reversed(paths):
            start = time.perf_counter()
            images = paths[name]()
            seconds = time.perf_counter() - start
            if number >= warm_up:
                measured[name].append(images / seconds)
    return {name: Rates(tuple(rates)) for name, rates in measured.items()}
