"""Speeds measured side by side: every round runs every path once, so that what slows the machine slows them all.

    {name: path} -> interleave -> {name: Rates} -> Rates, ratio: median and quartiles over the rounds

A path does some work and returns how many images that was. Ratios are taken within a round, and then their median.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements and the range that holds half of them."""

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
        """Over the rounds."""
        return spread(self.rounds)


def spread(values: tuple[float, ...]) -> Spread:
    """Median and quartiles of measurements."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high)


def ratio(ours: Rates, theirs: Rates) -> Spread:
    """How many times as fast one path is as another, of the same `interleave`."""
    return spread(tuple(one / other for one, other in zip(ours.rounds, theirs.rounds, strict=True)))


def interleave(paths: Mapping[str, Callable[[], int]], *, rounds: int, warm_up: int = 1) -> dict[str, Rates]:
    """Runs all paths in turn, `warm_up` rounds unmeasured, then `rounds` measured ones, each in the opposite order.

    A path must have ended its work when it returns: on a GPU it waits for the device itself.
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
