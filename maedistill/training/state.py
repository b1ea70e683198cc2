"""The state of training that an engine gathers and loads; `checkpoint.py` stores it in files."""

from dataclasses import dataclass, field

from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW names them


@dataclass
class TrainingState:
    """Unpartitioned CPU tensors by name, independent of the number of ranks and the ZeRO stage."""

    weights: dict[str, Tensor] = field(default_factory=dict)  # parameters and persistent buffers
    moments: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {moment: {} for moment in MOMENTS})
    scalars: dict[str, float] = field(default_factory=dict)  # number of Adam updates; fp16's loss scale
