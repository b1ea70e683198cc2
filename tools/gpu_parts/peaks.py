"""The peak speeds of the card: matrix products in bf16, and copies within its memory.

M rows   N columns   K inner size
"""

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from gpu_parts.check import Check
from maedistill.benchmark.step import matrix_peak

PRODUCT, COPY = "bf16 product", "copy"
TINY_SIDES = (128, 256)
# Matrix shapes of a step at batch 256: MLPs of student, teacher and light decoder, and a decoder's second MLP layer.
SHAPES = ((12800, 3072, 768), (12800, 4096, 1024), (50432, 1536, 384), (50432, 2048, 512), (50432, 512, 2048))
_SECONDS = 0.2  # shortest duration of a measurement


def run(check: Check) -> None:
    """Measure each once. The fastest square product is the peak to which other parts compare their FLOP/s."""
    peak, side = fastest_product(check)
    check.measured(PRODUCT, f"{peak / 1e12:.4g} TFLOP/s, side {side}", flops=peak)
    with check.guarded(COPY):
        source = torch.empty(2**20 if check.tiny else 2**30, device=check.device)  # 4 GiB
        target = torch.empty_like(source)
        rate = 2 * source.nbytes / seconds(check, lambda: target.copy_(source))
        check.measured(COPY, f"{rate / 1e12:.4g} TB/s", bytes_per_second=rate)
    for rows, columns, inner in SHAPES:
        name = f"product {64 if check.tiny else rows} x {columns} x {inner}"
        with check.guarded(name):
            flops = product(check, 64 if check.tiny else rows, columns, inner)
            check.measured(name, f"{flops / 1e12:.4g} TFLOP/s", flops=flops)


def fastest_product(check: Check) -> tuple[float, int]:
    """Return FLOP per second of the fastest square product in bf16, and its side."""
    return matrix_peak(torch.bfloat16, check.device, TINY_SIDES if check.tiny else ())


def measured_peak(check: Check) -> float:
    """Return the peak that the part `peaks` measured, or measure it if that part has not run."""
    found = [row.values["flops"] for row in check.rows.all() if row.part == "peaks" and row.check == PRODUCT]
    return found[-1] if found else fastest_product(check)[0]


def product(check: Check, rows: int, columns: int, inner: int) -> float:
    """Return FLOP per second of a linear layer in bf16, without bias."""
    x = torch.randn(rows, inner, device=check.device, dtype=torch.bfloat16)  # [M, K]
    weight = torch.randn(columns, inner, device=check.device, dtype=torch.bfloat16)  # [N, K]
    return 2 * rows * columns * inner / seconds(check, lambda: F.linear(x, weight))


def seconds(check: Check, work: Callable[[], object]) -> float:
    """Return the average time of one call over many calls, until the device has finished all of them."""
    for _ in range(3):
        work()
    count, spent = 1, 0.0
    while spent < (0.01 if check.tiny else _SECONDS):
        count *= 2
        check.wait()
        start = time.perf_counter()
        for _ in range(count):
            work()
        check.wait()
        spent = time.perf_counter() - start
    return spent / count
