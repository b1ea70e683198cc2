"""What a run has learned so far, as an engine hands it out and takes it back; `checkpoint.py` keeps it in files."""

from dataclasses import dataclass, field

from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW names them


@dataclass
class TrainingState:
    """Whole tensors on the CPU by name, whatever number of ranks and ZeRO stage they come from or go to."""

    weights: dict[str, Tensor] = field(default_factory=dict)  # parameters and persistent buffers
    moments: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {moment: {} for moment in MOMENTS})
    scalars: dict[str, float] = field(default_factory=dict)  # updates that Adam has made; fp16's loss scale
