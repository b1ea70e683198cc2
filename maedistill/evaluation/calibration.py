"""Is a classifier right as often as it says: the expected calibration error (Guo et al., 2017).

    confidences, right or wrong -> bins of equal width -> Calibration

Bin i of m holds the confidences in (i / m, (i + 1) / m]. In each, the share that is right is held against the mean
confidence; the error is the mean difference over images. Counts are whole numbers and sums exact, rounded once, so no
order of summation matters.

    n images   m bins
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """What happened in each bin of confidence, from 0 to 1."""

    images: tuple[int, ...]  # per bin
    correct: tuple[int, ...]
    confidence: tuple[float, ...]  # the sum over the bin's images

    @property
    def error(self) -> float:
        """The expected calibration error, a share in [0, 1]."""
        gaps = (abs(right - sure) for right, sure in zip(self.correct, self.confidence, strict=True))
        return math.fsum(gaps) / sum(self.images)

    @property
    def mean_confidence(self) -> float:
        """Mean probability of the best class; above the accuracy, the classifier is too sure of itself."""
        return math.fsum(self.confidence) / sum(self.images)

    def line(self) -> str:
        """The result in one line."""
        accuracy = sum(self.correct) / sum(self.images)
        verdict = "too sure of itself" if self.mean_confidence > accuracy else "not sure enough"
        return (
            f"calibration error {100 * self.error:.2f} % ({len(self.images)} bins), mean confidence "
            f"{100 * self.mean_confidence:.2f} %: on the whole {verdict}"
        )

    def facts(self) -> dict[str, Any]:
        """For a result file, with the reliability diagram: of each bin that holds images what happened there."""
        bins = [
            {"up_to": (i + 1) / len(self.images), "images": count, "correct": right, "confidence": sure / count}
            for i, (count, right, sure) in enumerate(zip(self.images, self.correct, self.confidence, strict=True))
            if count
        ]
        return {"calibration_error": self.error, "confidence": self.mean_confidence, "calibration": bins}


def calibrate(confidences: Tensor, correct: Tensor, *, bins: int = BINS) -> Calibration:
    """Sorts images into `bins` by confidence. confidences: float32 [n] in [0, 1]; correct: bool [n], n at least 1."""
    assert len(confidences) and bins >= 1
    place = (confidences.double() * bins).ceil().long().sub(1).clamp(0, bins - 1)  # [n]; the product is exact
    images = place.bincount(minlength=bins)  # [m]
    right = place[correct].bincount(minlength=bins)  # [m]
    sure = [math.fsum(part.tolist()) for part in confidences[place.argsort()].split(images.tolist())]
    return Calibration(tuple(images.tolist()), tuple(right.tolist()), tuple(sure))
