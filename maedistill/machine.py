"""What the machine offers: number formats, CPU cores and GPUs."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BF16_CAPABILITY = (8, 0)  # Ampere, the first with bf16 units; older cards convert around every operation


def precision(name: str, device: torch.device) -> str:
    """Resolve `auto`: on a GPU bf16, or fp16 where the card only emulates bf16; on a CPU fp32."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= _BF16_CAPABILITY else "fp16"


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """For what half precision would spoil. Meta tensors, whose FLOPs are counted, have no autocast to leave."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def named_gpus(environ: Mapping[str, str]) -> list[str] | None:
    """Read CUDA_VISIBLE_DEVICES: numbers, "GPU-..." or "MIG-..."; None where it is not set.

    As for CUDA, nothing counts from the first entry on that is empty or negative.
    """
    if "CUDA_VISIBLE_DEVICES" not in environ:
        return None
    entries = (entry.strip() for entry in environ["CUDA_VISIBLE_DEVICES"].split(","))
    return list(takewhile(lambda entry: entry and not entry.startswith("-"), entries))


def visible_gpus() -> list[str]:
    """List the GPUs of this process, each as CUDA_VISIBLE_DEVICES names it to a process that is to have it alone."""
    count, named = torch.cuda.device_count(), named_gpus(os.environ)
    if named is None:
        return [str(number) for number in range(count)]
    # CUDA shows a process one MIG slice, however many are named; other processes can have the others.
    return [gpu for number, gpu in enumerate(named) if number < count or (count and gpu.startswith("MIG-"))]


def cpu_share(local_ranks: int) -> int:
    """CPU cores of one rank, when the machine's are shared fairly."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_ranks))
