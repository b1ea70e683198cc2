"""The smallest engine that can be saved and loaded: one tensor, as checkpoints ask of a real one."""

import torch
from torch import nn

from maedistill.training.engine import MOMENTS, TrainingState


class OneTensor:
    """Stands for an engine of one rank. Its weight is trained in place; its moments and its count follow from it."""

    def __init__(self, value: float = 0.0, width: int = 3) -> None:
        self.module = nn.ParameterDict({"w": torch.full((width,), float(value))})

    @property
    def weight(self) -> torch.Tensor:
        """Return the tensor itself."""
        return self.module["w"].data

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of the weight by name."""
        return {"w": tuple(self.weight.shape)}

    def state(self) -> TrainingState:
        """Return copies: the weight, its moments, which are 2 and 3 times the weight, and its value as a count."""
        moments = {moment: {"w": self.weight * k} for k, moment in enumerate(MOMENTS, start=2)}
        return TrainingState({"w": self.weight.clone()}, moments, {"updates": float(self.weight[0])})

    def load_state(self, state: TrainingState) -> None:
        """Take a state whose parts belong together."""
        assert torch.equal(state.moments["exp_avg"]["w"], 2 * state.weights["w"])
        assert state.scalars == {"updates": float(state.weights["w"][0])}
        self.weight.copy_(state.weights["w"])
