"""What fine-tuning minimises: cross-entropy with the labels, and the distillation terms that are on.

Supervised fine-tuning is that of MAE (He et al., CVPR 2022, appendix A.1). Each distillation term is weighted for the
current step.

B batch   C classes   s image side   K terms
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from maedistill.finetuning.outputs import Outputs, RequestedOutputs, forward_outputs
from maedistill.finetuning.term import Parts, Term
from maedistill.methods.mae import Losses
from maedistill.models.encoder import TimmModel


class Supervised(nn.Module):
    """Cross-entropy with soft targets. `vit` is an unmodified network, so that an export changes nothing."""

    def __init__(self, vit: TimmModel) -> None:
        super().__init__()
        self.vit = vit
        self.cross_entropy = SoftTargetCrossEntropy()

    def forward(self, images: Tensor, targets: Tensor) -> Losses:
        """Return scalar losses. images: normalised, mixed, [B, 3, s, s]. targets: rows that sum to 1, [B, C]."""
        logits = self.vit(images).float()  # [B, C]
        loss = self.cross_entropy(logits, targets)
        return {"loss": loss, "cross_entropy": loss}


class Distilled(nn.Module):
    """Cross-entropy plus distillation terms. The terms' own parameters, in `terms`, are not exported."""

    def __init__(
        self,
        vit: TimmModel,
        terms: Mapping[str, Term],
        *,
        requested: RequestedOutputs,
        label_weight: float,
        scheduled: Collection[str] = (),
    ) -> None:
        """Set up the module. requested: the student's outputs that the terms need, logits included. scheduled: terms
        whose weights change over time; these weights are logged beside the losses.
        """
        super().__init__()
        assert requested.logits
        self.vit = vit
        self.cross_entropy = SoftTargetCrossEntropy()
        self.terms: Any = nn.ModuleDict(terms)  # torch would type its values as Module, not Term
        self.requested, self.label_weight, self.scheduled = requested, label_weight, frozenset(scheduled)

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        teachers: Sequence[Outputs],
        weights: Tensor,
        past: Outputs | None = None,
    ) -> Losses:
        """Return scalar losses. images: normalised, mixed, [B, 3, s, s]. targets: rows that sum to 1, [B, C]. teachers:
        their outputs on the same images; empty if every weight is 0. weights: of the terms in this step, [K]. past:
        outputs of the network's own past (past.py), if there is one.
        """
        outputs = forward_outputs(self.vit, images, self.requested)
        outputs["logits"] = outputs["logits"].float()
        losses: Losses = {}
        total = weights.new_zeros(())
        if self.label_weight:
            losses["cross_entropy"] = self.cross_entropy(outputs["logits"], targets)
            total = self.label_weight * losses["cross_entropy"]
        for i, term in enumerate(self.terms.values()):
            against = teachers if term.section.needs_teacher else [past or {}]
            if not against:
                total = total + term.zero_loss(outputs["logits"])
                continue
            parts = _mean_over_teachers(
                [term(outputs, teacher, targets, number=n) for n, teacher in enumerate(against)]
            )
            losses |= parts
            total = total + weights[i] * term.total(parts)
        losses |= {f"weight/{name}": weights[i] for i, name in enumerate(self.terms) if name in self.scheduled}
        return {"loss": total, **losses}


def _mean_over_teachers(each: Sequence[Parts]) -> Parts:
    """Average the parts of a term over teachers; the parts of all teachers have the same names."""
    return {name: torch.stack([parts[name] for parts in each]).mean() for name in each[0]}
