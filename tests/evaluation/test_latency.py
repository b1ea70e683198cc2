"""Latency of a network whose time is known: it sleeps 4 ms an image, and much longer in its first passes."""

import time

import pytest
import torch
from torch import nn

from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.latency import image_seconds, measure_latency


class Sleeper(nn.Module):
    """Notes what it was given and in which state it was."""

    def __init__(self):
        super().__init__()
        self.linear, self.batches, self.seen = nn.Linear(8, 2), [], set()

    def forward(self, images):
        time.sleep(0.3 if len(images) not in self.batches else 0.004 * len(images))
        self.batches.append(len(images))
        out = self.linear(images[:, 0, 0])
        self.seen.add((self.training, tuple(images.shape[1:]), out.dtype, torch.is_grad_enabled()))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_time_of_a_network_after_its_warm_up(precision, dtype):
    network = Sleeper()
    found = measure_latency(
        network, EvalContext(torch.device("cpu"), batch=5, workers=0, precision=precision), size=8, seconds=0.1
    )  # 10 to 25 images, one after the other, then 1, 2, 4, 8 passes of 5 images until they take 0.1 s
    assert 4 <= found["latency_ms"] <= found["latency_p90_ms"] < 100  # sleeping takes longer on a busy machine
    assert 20 < found["images_per_second"] <= 250
    assert network.training and network.seen == {(False, (3, 8, 8), dtype, False)}
    assert set(network.batches) == {1, 5} and network.batches.count(1) >= 13 and network.batches.count(5) >= 4


def test_half_precision_converts_the_weights_once():
    network, passes = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 2)), 13
    context = EvalContext(torch.device("cpu"), batch=1, workers=0, precision="bf16")
    with torch.profiler.profile() as profile:
        (times,) = image_seconds([(network, 2)], context, seconds=0.0)
    conversions = [event for event in profile.events() if event.name == "aten::_to_copy"]
    assert (len(times), len(conversions)) == (passes - 3, 4 + passes)  # weights and biases once, the image each time


def test_networks_take_turns():
    """So what slows the machine for a while slows all of them."""
    order, networks = [], [nn.Identity() for _ in range(3)]
    for number, network in enumerate(networks):
        network.register_forward_pre_hook(lambda *_, number=number: order.append(number))
    context = EvalContext(torch.device("cpu"), batch=1, workers=0)
    times = image_seconds([(network, 8) for network in networks], context, seconds=0.0)
    assert order[9:] == [0, 1, 2] * 10 and [len(found) for found in times] == [10] * 3
