"""The calibration error against the definition in exact fractions, and at the edges of bins."""

from fractions import Fraction

import pytest
import torch

from maedistill.evaluation.calibration import calibrate


def expected_error(confidences, correct, bins):
    """Guo et al. (2017), equation 3, image by image in rational numbers."""
    total = Fraction(0)
    for i in range(bins):
        low, high = Fraction(i, bins), Fraction(i + 1, bins)
        inside = [
            (Fraction(c), int(right))
            for c, right in zip(confidences, correct, strict=True)
            if low < Fraction(c) <= high or (c == 0 and i == 0)
        ]
        total += abs(sum(right for _, right in inside) - sum(c for c, _ in inside))
    return total / len(confidences)


@pytest.mark.parametrize("bins", [1, 3, 10, 15])
def test_it_is_the_definition_in_any_order(bins):
    draws = torch.Generator().manual_seed(bins)
    confidences = torch.cat([torch.rand(300, generator=draws), torch.tensor([0.0, 0.2, 1 / 3, 0.5, 0.8, 1.0])])
    correct = torch.rand(306, generator=draws) < confidences**2
    found = calibrate(confidences, correct, bins=bins)
    expected = expected_error(confidences.tolist(), correct.tolist(), bins)
    assert found.error == pytest.approx(float(expected), rel=1e-15) and 0.05 < found.error < 0.5
    assert sum(found.images) == 306 and sum(found.correct) == int(correct.sum())
    order = torch.randperm(306, generator=draws)
    assert calibrate(confidences[order], correct[order], bins=bins) == found
    assert "overconfident" in found.line() and f"({bins} bins)" in found.line()


def test_who_is_right_as_often_as_said_has_no_error():
    found = calibrate(torch.tensor([0.75] * 4 + [0.25] * 4), torch.tensor([1, 1, 1, 0, 0, 0, 1, 0]).bool(), bins=4)
    assert found.error == 0 and found.mean_confidence == 0.5
    assert found.metrics()["calibration"] == [
        {"up_to": 0.25, "images": 4, "correct": 1, "confidence": 0.25},
        {"up_to": 0.75, "images": 4, "correct": 3, "confidence": 0.75},
    ]


def test_an_edge_belongs_to_the_bin_below_it():
    assert calibrate(torch.tensor([0.0, 0.5, 0.5000001, 1.0]), torch.ones(4).bool(), bins=2).images == (2, 2)


def test_a_small_error_or_few_images_allow_no_verdict():
    """Guards against 'overconfident' on 20 images, or at an error of 0.2 %."""
    for right, images, confidence, verdict in (
        (10, 20, 0.6, ""),
        (1000, 2000, 0.6, ": overconfident"),
        (1000, 2000, 0.4, ": underconfident"),
        (0, 50_000, 0.002, ""),
    ):
        correct = torch.arange(images) < right
        found = calibrate(torch.full((images,), confidence), correct)
        assert found.line().endswith(f"mean confidence {100 * confidence:.2f} %{verdict}")
