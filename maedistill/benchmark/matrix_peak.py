"""The speed of this machine's fastest matrix product: a practical upper bound for a training step."""

import time

import torch

SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192, 16384)}
_REPEATS = 5
_SECONDS = 0.1  # shortest duration of a measurement


def matrix_peak(dtype: torch.dtype, device: torch.device) -> tuple[float, int]:
    """Return the FLOP per second of the fastest square product in `dtype` among `SIDES`, and its side."""
    return max((_speed(side, dtype, device), side) for side in SIDES[device.type])


def _speed(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the best of several measurements, in FLOP per second."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    count = 1
    while (seconds := _seconds(left, right, count)) < _SECONDS:
        count *= 2
    best = min(seconds, *(_seconds(left, right, count) for _ in range(_REPEATS)))
    return count * 2 * side**3 / best


def _seconds(left: torch.Tensor, right: torch.Tensor, count: int) -> float:
    out = torch.empty_like(left)
    start = time.perf_counter()
    for _ in range(count):
        torch.matmul(left, right, out=out)
    if left.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
