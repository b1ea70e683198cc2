"""The whole run in float64: what differs then is no rounding.

Images, losses and checkpoints are fp32 and mostly say so with `.float()`. Here that word means double for numbers (not
for truth values: fused AdamW reads its verdict as fp32), and the module becomes double once DeepSpeed, which accepts
fp32 alone, has taken it. For ZeRO stage 0 without moving average and kNN.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from maedistill import machine
from maedistill.training import engine as engine_file

_float, _build = Tensor.float, engine_file.Engine.__init__


def compute_in_float64() -> None:
    """Widen everything that this process is going to compute, save and load."""
    Tensor.float = lambda tensor: _float(tensor) if tensor.dtype == torch.bool else tensor.double()
    machine.DTYPES["fp32"] = torch.float64  # the teacher's
    engine_file.broadcast_tensor = partial(engine_file.broadcast_tensor, dtype=torch.float64)
    engine_file.Engine.__init__ = _build_double


def _build_double(engine: engine_file.Engine, *arguments: Any, **keywords: Any) -> None:
    """`Engine.__init__`, then weights and moments as double and gradients reduced as such."""
    import deepspeed

    _build(engine, *arguments, **keywords)
    engine.module.double()
    engine._create_moments()
    engine._deepspeed.communication_data_type = torch.float64
    accelerator = deepspeed.get_accelerator()
    supported = [*accelerator.supported_dtypes(), torch.float64]
    accelerator.supported_dtypes = lambda: supported
