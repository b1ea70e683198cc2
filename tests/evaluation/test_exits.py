"""Images leave at the first exit that is confident enough: the curve against a loop over images."""

import pytest
import torch

from maedistill.errors import ConfigError
from maedistill.evaluation.exits import Ending, operations, score_exits
from maedistill.weights.open_network import open_network


@pytest.mark.parametrize("source", ["nowhere", "resnet50", "a.pth"])
def test_a_path_that_is_not_there_is_named_as_by_evaluate(source):
    told = []
    for start in (lambda: open_network(source, "classifier"), lambda: score_exits(source, "val-*.tar", None)):
        with pytest.raises(ConfigError) as error:
            start()
        told.append((error.value.cause, error.value.remedy))
    assert told[0] == told[1]


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
