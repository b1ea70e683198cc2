"""Latency and throughput of a network on this machine: the time of one image, and images per second in batches.

The images are random and already on the device, so reading and decoding are not measured.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from maedistill.evaluation.full_pass import evaluation_mode
from maedistill.machine import DTYPES

_WARM_UP = 3  # passes; the first ones load kernels, choose algorithms and allocate memory
_LEAST = 10  # timed passes of one image, however slow they are


@torch.inference_mode()
def measure_latency(
    network: nn.Module, *, size: int, batch: int, device: torch.device, precision: str = "fp32", seconds: float = 2.0
) -> dict[str, float]:
    """Time `network` (on `device`) on random images [1 or batch, 3, size, size] for about `seconds` each.

    Returns latency_ms and latency_p90_ms, the median and 90th percentile of one image's pass, and images_per_second at
    `batch`. Half precision uses autocast, which converts the weights once, not in every pass.
    """
    dtype = DTYPES[precision]
    with evaluation_mode(network), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        one, many = (torch.rand(count, 3, size, size, device=device) for count in (1, batch))
        times = _single_passes(lambda: network(one), device, seconds)
        pause = _mean_pass(lambda: network(many), device, seconds)
    median, p90 = np.quantile(times, [0.5, 0.9]).tolist()
    return {"latency_ms": 1e3 * median, "latency_p90_ms": 1e3 * p90, "images_per_second": batch / pause}


def _single_passes(run: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Return the seconds of each pass, where each pass starts only after the previous one has ended."""
    times: list[float] = []
    for _ in range(_WARM_UP):
        run()
    _wait(device)
    end = time.perf_counter() + seconds
    while len(times) < _LEAST or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return times


def _mean_pass(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the mean seconds per pass, without waiting in between. Doubles the passes until they take `seconds`.

    On a GPU the host queues all passes and waits once, like a loop that never reads the results.
    """
    count, elapsed = 0, 0.0
    run()
    _wait(device)
    while elapsed < seconds:
        count = 2 * count or 1
        start = time.perf_counter()
        for _ in range(count):
            run()
        _wait(device)
        elapsed = time.perf_counter() - start
    return elapsed / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
