"""What all distillation terms have in common: parts by name, a total, and a zero for steps in which they are off.

    term(student outputs, teacher outputs, targets, number=i) -> {name: scalar}, the term's parts, each logged by itself
    term.total(parts) -> scalar, which the term's weight multiplies

Outputs are those of `outputs.py`, the teacher's grids resampled to the student's; a term without a teacher gets
what else there is to compare with, as the predictions of the network's past (`past.py`).

B batch   C classes
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maedistill.config import distill
from maedistill.finetuning.outputs import FeatureInfo, Outputs

Parts = dict[str, Tensor]


class Term(nn.Module):
    """One distillation term. Its parts count equally: the total is their mean, e.g. over pairs of depths.

    name: of its section in the config; the names of its parts begin with it.
    """

    def __init__(
        self, name: str, section: distill.TermConfig, student: FeatureInfo, teachers: Sequence[FeatureInfo]
    ) -> None:
        super().__init__()
        self.name, self.section = name, section
        self._build(student, teachers)

    def forward(self, student: Outputs, teacher: Outputs, targets: Tensor, *, number: int) -> Parts:
        """Return the parts by name. targets: rows that sum to 1, [B, C]. number: of the teacher, from 0."""
        return {self.name + end: loss for end, loss in self._losses(student, teacher, targets, number).items()}

    def zero_loss(self, like: Tensor) -> Tensor:
        """Return a zero that depends on every parameter of the term; without it ZeRO may reuse a stale gradient.

        It runs the layers that own the parameters: ZeRO 3 holds those of a layer only while it runs. like: any tensor.
        """
        zero = like.new_zeros(())
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                width = layer.in_features if isinstance(layer, nn.Linear) else layer.normalized_shape[0]
                zero = zero + 0 * layer(like.new_zeros(1, width)).sum()
        return zero

    def total(self, parts: Parts) -> Tensor:
        """Return the value that the term's weight multiplies."""
        return torch.stack(list(parts.values())).mean()

    def _build(self, student: FeatureInfo, teachers: Sequence[FeatureInfo]) -> None:
        """Make what depends on the networks. Raises ConfigError if the term cannot compare them."""

    def _losses(self, student: Outputs, teacher: Outputs, targets: Tensor, number: int) -> Parts:
        """Return the parts by the ends of their names."""
        raise NotImplementedError
