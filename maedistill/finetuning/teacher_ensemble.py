"""The teachers' part of a step: the outputs of each teacher, and the weight of every term at that step.

B batch   s image side
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from maedistill.finetuning.outputs import Outputs
from maedistill.finetuning.teacher import OfflineTeacher
from maedistill.finetuning.term_schedule import Schedule, weight_table


class TeacherEnsemble:
    """Frozen teachers outside the engine, and the schedules of terms in the order of the trained module's terms."""

    def __init__(
        self,
        teachers: Sequence[OfflineTeacher],
        schedules: Mapping[str, Schedule],
        *,
        steps: int,
        epoch_at: Callable[[int], float],
        device: torch.device,
    ) -> None:
        """Tabulate the terms' weights. steps: of the run; epoch_at: epochs done before a step."""
        self.teachers, self.schedules = tuple(teachers), dict(schedules)
        weights = weight_table(tuple(self.schedules.values()), steps=steps, epoch_at=epoch_at)  # [steps, terms]
        self.heaviest_step = int(weights.sum(dim=1).argmax())  # the step whose weights are largest
        self._counts = weights.any(dim=1).tolist()
        self._weights = weights.to(device)

    def __call__(self, images: Tensor, step: int) -> tuple[list[Outputs], Tensor]:
        """Return the teachers' outputs on images [B, 3, s, s], none if every weight is 0, and weights [terms]."""
        views = [teacher(images) for teacher in self.teachers] if self._counts[step] else []
        return views, self._weights[step]
