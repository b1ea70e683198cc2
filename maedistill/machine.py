"""What the machine offers: number formats and CPU cores."""

import os

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision(name: str, device: torch.device) -> str:
    """Resolves `auto`: bf16 on a GPU, fp32 on a CPU."""
    return name if name != "auto" else ("bf16" if device.type == "cuda" else "fp32")


def cpu_share(local_ranks: int) -> int:
    """CPU cores of one rank, when the machine's are shared fairly."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_ranks))
