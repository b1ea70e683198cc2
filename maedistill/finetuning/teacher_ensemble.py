"""What a step gets from its teachers: one view of each, and the weight of every term at that step.

B batch   s image side
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from maedistill.finetuning.outputs import Outputs
from maedistill.finetuning.teacher import OfflineTeacher
from maedistill.finetuning.term_schedule import Schedule, weight_table


class TeacherEnsemble:
    """Frozen teachers beside the engine, and the schedules of the terms in the order of the trained module's."""

    def __init__(
        self,
        teachers: Sequence[OfflineTeacher],
        schedules: Mapping[str, Schedule],
        *,
        steps: int,
        epoch_at: Callable[[int], float],
        device: torch.device,
    ) -> None:
        """steps: of the run; epoch_at: epochs done before a step."""
        self.teachers, self.schedules = tuple(teachers), dict(schedules)
        weights = weight_table(tuple(self.schedules.values()), steps=steps, epoch_at=epoch_at)  # [steps, terms]
        self.heaviest_step = int(weights.sum(dim=1).argmax())  # the step whose weights are largest
        self._counts = weights.any(dim=1).tolist()
        self._weights = weights.to(device)

    def __call__(self, images: Tensor, step: int) -> tuple[list[Outputs], Tensor]:
        """The teachers' views of the student's images [B, 3, s, s], none where no term counts; weights [terms]."""
        views = [teacher(images) for teacher in self.teachers] if self._counts[step] else []
        return views, self._weights[step]
