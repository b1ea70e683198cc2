"""As many samples at once as a GPU has memory for, found at the start of a run.

    trial steps of 8 and 16 samples -> peak bytes, a straight line -> the largest share of the batch below the limit
    one trial step of that size -> it fits, or the next smaller share is tried

A larger micro-batch saves launches and passes over the gradients; the numbers of a run change by rounding only.
"""

from collections.abc import Callable, Sequence

import torch

from maedistill.config.batch import BatchPlan
from maedistill.processes import ranks as distributed

_SAMPLES = ((8, 16), (1, 2))  # of the two trials; the second pair where 16 do not fit
_USABLE = 0.92  # of the memory: the allocator's gaps, NCCL's and cuBLAS's buffers take the rest


def fit_to_memory(
    plans: Sequence[BatchPlan], trial: Callable[[int], None], *, device: torch.device, later_bytes: float
) -> BatchPlan:
    """Return the first of `plans`, largest micro-batch first, that fits on the GPUs of all ranks. Collective.

    trial: makes a forward and backward pass of so many samples and frees everything but the gradients. later_bytes:
    what training allocates besides, such as Adam's moments. Raises torch.OutOfMemoryError where not even the last fits.
    """
    limit = _USABLE * usable_bytes(device) - later_bytes
    fixed, each = _line(trial, device=device)
    number = next((i for i, plan in enumerate(plans) if fixed + each * plan.micro_batch <= limit), len(plans) - 1)
    while not _fits(trial, plans[number].micro_batch, limit=limit, device=device):
        if number == len(plans) - 1:
            raise torch.OutOfMemoryError(f"{plans[number].micro_batch} samples at once need more than there is")
        number += 1
    return plans[max(distributed.gather_objects(number))]


def _line(trial: Callable[[int], None], *, device: torch.device) -> tuple[float, float]:
    """Return the bytes of a trial without samples, and of each sample."""
    for few, many in _SAMPLES:
        try:
            trial(few)  # leaves the gradients, so that both measured trials begin with them
            small, large = (peak_bytes(trial, count, device=device) for count in (few, many))
        except torch.OutOfMemoryError:
            if (few, many) == _SAMPLES[-1]:
                raise
            continue
        each = (large - small) / (many - few)
        return small - each * few, each
    raise AssertionError


def usable_bytes(device: torch.device) -> int:
    """Memory that this process has or could have."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def peak_bytes(trial: Callable[[int], None], count: int, *, device: torch.device) -> int:
    """The most memory that is allocated during a trial of `count` samples."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    trial(count)
    return torch.cuda.max_memory_allocated(device)


def _fits(trial: Callable[[int], None], count: int, *, limit: float, device: torch.device) -> bool:
    try:
        return peak_bytes(trial, count, device=device) <= limit
    except torch.OutOfMemoryError:
        return False
