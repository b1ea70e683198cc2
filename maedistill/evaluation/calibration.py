"""Calibration of a classifier: the expected calibration error (Guo et al., 2017).

    confidence and correctness per image -> bins of equal width -> Calibration

Bin i of m holds the confidences in (i / m, (i + 1) / m]. Each bin compares its accuracy with its mean confidence; the
error is the mean absolute difference, weighted by images. Counts are integers, and sums are exact and rounded once,
so the result does not depend on the order of the images.

    n images   m bins
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maedistill.report.intervals import of_count

_BINS = 15
_SMALL_ERROR = 0.01  # a calibration error below it needs no remedy


@dataclass(frozen=True)
class Calibration:
    """Counts and confidence per bin, for bins of confidence from 0 to 1."""

    images: tuple[int, ...]  # per bin
    correct: tuple[int, ...]
    confidence_sum: tuple[float, ...]

    @property
    def error(self) -> float:
        """Return the expected calibration error, in [0, 1]."""
        gaps = (abs(correct - total) for correct, total in zip(self.correct, self.confidence_sum, strict=True))
        return math.fsum(gaps) / sum(self.images)

    @property
    def mean_confidence(self) -> float:
        """Return the mean probability of the best class. Above the accuracy, the classifier is overconfident."""
        return math.fsum(self.confidence_sum) / sum(self.images)

    def line(self) -> str:
        """Format the result as one line."""
        return (
            f"expected error {100 * self.error:.2f} % ({len(self.images)} bins), mean confidence "
            f"{100 * self.mean_confidence:.2f} %{self._verdict()}"
        )

    def _verdict(self) -> str:
        """Say which way the confidence is wrong, if chance on so many images does not explain it."""
        accuracy = of_count(sum(self.correct), sum(self.images))
        if self.error < _SMALL_ERROR or accuracy.low <= self.mean_confidence <= accuracy.high:
            return ""
        return ": overconfident" if self.mean_confidence > accuracy.value else ": underconfident"

    def metrics(self) -> dict[str, Any]:
        """Return the entries for a result file, with the reliability diagram: one entry per non-empty bin."""
        counts = enumerate(zip(self.images, self.correct, self.confidence_sum, strict=True), start=1)
        bins = [
            {"up_to": i / len(self.images), "images": images, "correct": correct, "confidence": total / images}
            for i, (images, correct, total) in counts
            if images
        ]
        return {"calibration_error": self.error, "confidence": self.mean_confidence, "calibration": bins}


def calibrate(confidences: Tensor, correct: Tensor, *, bins: int = _BINS) -> Calibration:
    """Sort images into `bins` by confidence. confidences: float32 [n] in [0, 1]; correct: bool [n], n at least 1."""
    assert len(confidences) and bins >= 1
    place = (confidences.double() * bins).ceil().long().sub(1).clamp(0, bins - 1)  # [n]; the product is exact
    images, right = (places.bincount(minlength=bins).tolist() for places in (place, place[correct]))  # m each
    confidence_sum = [math.fsum(part.tolist()) for part in confidences[place.argsort()].split(images)]
    return Calibration(tuple(images), tuple(right), tuple(confidence_sum))
