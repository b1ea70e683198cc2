"""Images leave at the first exit that is confident enough: the curve against a loop over images."""

import torch

from maedistill.evaluation.exits import Ending, operations


def test_operations_are_those_of_a_loop_over_images():
    draws = torch.Generator().manual_seed(0)
    correct, confidences = torch.rand(50, 3, generator=draws) < 0.6, torch.rand(50, 3, generator=draws)
    endings = [Ending(i, 10, float(i + 1), 2.0 * (i + 1), 0, 50) for i in range(3)]
    curve = operations(correct, confidences, endings)
    assert curve[0].shares == (1.0, 0.0, 0.0) and curve[-1].shares == (0.0, 0.0, 1.0) and len(curve) == 23
    for point in curve:
        right = cost = 0.0
        for i in range(50):
            place = next((e for e in (0, 1) if confidences[i, e].double() >= point.threshold), 2)
            right, cost = right + bool(correct[i, place]), cost + 2.0 * (place + 1)
        assert abs(point.top1 - right / 50) < 1e-6 and abs(point.latency_ms - cost / 50) < 1e-5
        assert abs(point.gflop - cost / 100) < 1e-5 and abs(sum(point.shares) - 1) < 1e-6
