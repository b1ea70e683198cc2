"""What the machine offers: number formats and CPU cores."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision(name: str, device: torch.device) -> str:
    """Resolves `auto`: bf16 on a GPU, fp32 on a CPU."""
    return name if name != "auto" else ("bf16" if device.type == "cuda" else "fp32")


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """For what half precision would spoil. Meta tensors, whose FLOPs are counted, have no autocast to leave."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def cpu_share(local_ranks: int) -> int:
    """CPU cores of one rank, when the machine's are shared fairly."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_ranks))
