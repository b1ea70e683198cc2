"""A teacher without weights of its own: the moving average of the student's encoder (as in data2vec and BootMAE).

After every update theta <- d theta + (1 - d) student, with a decay d that rises over the run. The average stands beside
the engine in fp32, and checkpoints keep it.

B batch   T patches visible to the teacher   Q its prefix tokens   D width   s image side
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from maedistill.machine import Precision, autocast
from maedistill.methods.teacher import Teacher
from maedistill.models.encoder import Encoder
from maedistill.models.masking import PatchSplit
from maedistill.weights.network import Network

COLLAPSED = 0.1  # data2vec stops a run whose targets deviate by less


class AverageTeacher(Teacher):
    """Computes features as `Teacher` does, by a network that follows the student.

    source: a copy of the student. decay: of the first and of the last of the run's `steps`, a half cosine between.
    """

    def __init__(
        self,
        source: Network,
        *,
        taps: Sequence[int],
        last: int | None,
        output: str,
        decay: tuple[float, float],
        steps: int,
        precision: Precision,
    ) -> None:
        super().__init__(source, taps=taps, last=last, output=output)
        self.decay, self.steps, self.precision = decay, steps, precision

    def decay_at(self, step: int) -> float:
        """Return the decay of the update of `step`, from 0."""
        first, last = self.decay
        return last - (last - first) * (1 + math.cos(math.pi * step / max(1, self.steps - 1))) / 2

    def forward(self, images: Tensor, split: PatchSplit) -> dict[int, Tensor]:
        """Map images in [0, 1], [B, 3, s, s], to {block: [B, Q + T, D]}, under autocast, since the weights are fp32."""
        with nullcontext() if images.is_meta else autocast(images.device, self.precision):
            return super().forward(images, split)

    @torch.no_grad()
    def follow(self, student: Encoder, step: int) -> None:
        """Move towards the student's weights, after its update of `step`."""
        own, new = (
            [value for value in network.state_dict().values() if value.is_floating_point()]
            for network in (self.network, student)
        )
        torch._foreach_lerp_(own, new, 1 - self.decay_at(step))

    @torch.no_grad()
    def deviation(self, target: dict[int, Tensor]) -> Tensor:
        """Return the standard deviation of the targets over a micro-batch's patches, mean over channels: a scalar.

        Near 0, all patches of all images have the same target: the average has collapsed.
        """
        rows = torch.stack([value[:, self.num_prefix :].float().flatten(0, 1) for value in target.values()])
        return rows.std(dim=1).mean()
