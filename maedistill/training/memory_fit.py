"""The largest micro-batch that fits in GPU memory, found at the start of a run.

    trial steps of 8 and 16 samples -> peak bytes -> linear fit -> the largest share of the batch below the limit
    one trial step of that size -> it fits, or the next smaller share is tried

A larger micro-batch saves kernel launches and passes over the gradients; it changes results by rounding only.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from maedistill.config.plan import BatchPlan
from maedistill.machine import runs_on_gpu
from maedistill.processes import distributed

_SAMPLES = ((8, 16), (1, 2))  # of the two trials; the second pair is for GPUs that cannot fit 16
_USABLE = 0.92  # of the memory; allocator gaps and the buffers of NCCL and cuBLAS take the rest


def fit_to_memory(
    plans: Sequence[BatchPlan], trial: Callable[[int], None], *, device: torch.device, later_bytes: float
) -> BatchPlan:
    """Return the first of `plans`, largest micro-batch first, that fits on the GPUs of all ranks. Collective.

    trial: runs a forward and backward pass of that many samples and frees everything but the gradients. later_bytes:
    what training allocates on top, such as Adam's moments. Jobs of a study that share the GPU get equal parts of it.
    Raises torch.OutOfMemoryError on all ranks if no plan fits on one of them.
    """
    free, total = torch.cuda.mem_get_info(device)
    usable = min(free + torch.cuda.memory_reserved(device), total / runs_on_gpu())
    number = _first_that_fits(plans, trial, device=device, limit=_USABLE * usable - later_bytes)
    numbers = distributed.gather_objects(len(plans) if number is None else number)
    if max(numbers) == len(plans):
        raise torch.OutOfMemoryError(f"{plans[-1].micro_batch} samples at once need more than there is")
    return plans[max(numbers)]


def _first_that_fits(
    plans: Sequence[BatchPlan], trial: Callable[[int], None], *, device: torch.device, limit: float
) -> int | None:
    """Return the number of the first plan that fits on this rank's GPU, None if none does."""
    if (line := _line(trial, device=device)) is None:
        return None
    fixed, each = line
    first = next((i for i, plan in enumerate(plans) if fixed + each * plan.micro_batch <= limit), len(plans) - 1)
    for number in range(first, len(plans)):
        if _fits(trial, plans[number].micro_batch, limit=limit, device=device):
            return number
    return None


def _line(trial: Callable[[int], None], *, device: torch.device) -> tuple[float, float] | None:
    """Return the fixed bytes of a trial and the bytes per sample; None if not even the smallest trials fit."""
    for few, many in _SAMPLES:
        with suppress(torch.OutOfMemoryError):
            trial(few)  # allocates the gradients, so that both measured trials start with them
            small, large = (_peak_bytes(trial, count, device=device) for count in (few, many))
            each = (large - small) / (many - few)
            return small - each * few, each
    return None


def _peak_bytes(trial: Callable[[int], None], count: int, *, device: torch.device) -> int:
    """Return the peak bytes allocated during a trial of `count` samples."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    trial(count)
    return torch.cuda.max_memory_allocated(device)


def _fits(trial: Callable[[int], None], count: int, *, limit: float, device: torch.device) -> bool:
    try:
        return _peak_bytes(trial, count, device=device) <= limit
    except torch.OutOfMemoryError:
        return False
