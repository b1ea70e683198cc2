"""Latency and throughput of a network on this machine: the time of one image, and images per second in batches.

The images are random and already on the device, so reading and decoding are not measured.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import nn

from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import evaluation_mode

_WARM_UP = 3  # passes; the first ones load kernels, choose algorithms and allocate memory
_LEAST = 10  # timed passes of one image, however slow they are


@torch.no_grad()  # autocast keeps no converted weights in inference mode
def image_seconds(
    networks: Sequence[tuple[nn.Module, int]], context: EvalContext, *, seconds: float = 2.0
) -> list[list[float]]:
    """Time passes of one image by each network (with the side of its images), for about `seconds` each.

    They take turns, so that whatever else the machine does bends no comparison between them.
    """
    device = context.device
    times: list[list[float]] = [[] for _ in networks]
    with ExitStack() as stack:
        for network, _ in networks:
            stack.enter_context(evaluation_mode(network))
        stack.enter_context(context.autocast())
        passes = [partial(network, torch.rand(1, 3, size, size, device=device)) for network, size in networks]
        for one in passes:
            seconds_of(one, device, repeats=_WARM_UP)
        end = time.perf_counter() + seconds * len(networks)
        while len(times[0]) < _LEAST or time.perf_counter() < end:
            for one, found in zip(passes, times, strict=True):
                found.append(seconds_of(one, device))
    return times


@torch.no_grad()
def measure_latency(network: nn.Module, context: EvalContext, *, size: int, seconds: float = 2.0) -> dict[str, float]:
    """Time `network` (on the device) on random images [1 or batch, 3, size, size] for about `seconds` each.

    Returns latency_ms and latency_p90_ms, the median and 90th percentile of one image's pass, and images_per_second in
    batches. Half precision uses autocast, which converts weights that require a gradient once, not in every pass.
    """
    device = context.device
    times = image_seconds([(network, size)], context, seconds=seconds)[0]
    with evaluation_mode(network), context.autocast():
        many = partial(network, torch.rand(context.batch, 3, size, size, device=device))
        seconds_of(many, device)
        passes = 1
        while (elapsed := seconds_of(many, device, repeats=passes)) < seconds:
            passes *= 2
    median, p90 = np.quantile(times, [0.5, 0.9]).tolist()
    speed = context.batch * passes / elapsed
    return {"latency_ms": 1e3 * median, "latency_p90_ms": 1e3 * p90, "images_per_second": speed}


def seconds_of(work: Callable[[], object], device: torch.device, *, repeats: int = 1) -> float:
    """Return the seconds of `repeats` calls in a row, from an idle device until it has finished them.

    On a GPU the host queues all calls and waits once, like a loop that never reads the results.
    """
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
