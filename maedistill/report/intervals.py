"""95 % intervals of accuracies and of their differences.

One run: an interval of the count of correct images, so it says what other test images would change.
Several seeds: an interval of the mean over runs, so it says what other seeds would change.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

_Z = 1.959964  # of the normal distribution, for 95 %
# Student's t for 95 %, by degrees of freedom. Above 30, the expansion below is exact to 0.0001.
_T: tuple[float, ...] = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010)
_T += (2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595)
_T += (2.0555, 2.0518, 2.0484, 2.0452, 2.0423)


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, all as fractions. kind: what the interval was computed from."""

    value: float
    low: float
    high: float
    kind: str  # "images", "paired images" or "seeds"

    def entries(self) -> dict[str, Any]:
        """Return the entries for a result file."""
        return {"low": self.low, "high": self.high, "interval": self.kind}


def of_count(correct: int, images: int) -> Interval:
    """Return Wilson's interval of the share of correct images."""
    assert 0 <= correct <= images and images > 0
    share, z2 = correct / images, _Z**2
    centre = (share + z2 / (2 * images)) / (1 + z2 / images)
    half = _Z * math.sqrt(share * (1 - share) / images + z2 / (4 * images**2)) / (1 + z2 / images)
    low, high = max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # rounding must not exclude it
    return Interval(share, low, high, "images")


def of_seeds(values: Sequence[float]) -> Interval:
    """Return the t interval of the mean of 2 or more runs, which differ in their seed."""
    freedom = len(values) - 1
    beyond = _Z + (_Z**3 + _Z) / (4 * freedom) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)
    t = _T[freedom - 1] if freedom <= len(_T) else beyond
    half = t * stdev(values) / math.sqrt(len(values))
    mean = fmean(values)
    return Interval(mean, mean - half, mean + half, "seeds")


def of_difference(correct: int, images: int, other_correct: int, other_images: int) -> Interval:
    """Return Newcombe's interval of the difference of two shares that were counted independently."""
    one, other = of_count(correct, images), of_count(other_correct, other_images)
    value = one.value - other.value
    low = value - math.hypot(one.value - one.low, other.high - other.value)
    high = value + math.hypot(one.high - one.value, other.value - other.low)
    return Interval(value, low, high, "images")


def of_pairs(correct: Sequence[bool], other_correct: Sequence[bool]) -> Interval:
    """Return the interval of the difference of two networks on the same images, in the same order.

    The interval is that of Agresti and Min (2005): Wald's, after half an image is added to each of the four cells.
    """
    assert len(correct) == len(other_correct) > 0
    gained = sum(one and not other for one, other in zip(correct, other_correct, strict=True))
    lost = sum(other and not one for one, other in zip(correct, other_correct, strict=True))
    images = len(correct) + 2
    centre = (gained - lost) / images
    half = _Z * math.sqrt((gained + lost + 1) / images - centre**2) / math.sqrt(images)
    return Interval((gained - lost) / len(correct), centre - half, centre + half, "paired images")
