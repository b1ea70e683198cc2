"""The weight of each distillation term in each step, from its start, warm-up and stop.

K terms
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from maedistill.config.distill import TermConfig
from maedistill.config.plan import Plan


class TermWeights:
    """A table on the device: a compiled step takes a row of it as input, and so neither waits nor recompiles.

    heaviest_step: the step whose weights are largest, the last such: the network's past begins after the first epoch.
    """

    def __init__(self, terms: Sequence[TermConfig], plan: Plan, device: torch.device) -> None:
        rows = [[term.weight_at(plan.epoch_at(step)) for term in terms] for step in range(plan.steps)]
        weights = torch.tensor(rows, dtype=torch.float32).view(plan.steps, len(terms))
        self.heaviest_step = plan.steps - 1 - int(weights.sum(dim=1).flip(0).argmax())
        compares = torch.tensor([term.needs_teacher for term in terms])
        self._counts = weights[:, compares].any(dim=1).tolist()
        self._weights = weights.to(device)

    def __getitem__(self, step: int) -> Tensor:
        """Return the weights in a step, in the order of the terms: [K]."""
        return self._weights[step]

    def needs_teachers(self, step: int) -> bool:
        """Return whether a term that compares with teachers counts in a step."""
        return self._counts[step]
