"""What fine-tuning minimises: cross-entropy with the labels, and the distillation terms that are on.

Supervised fine-tuning is that of MAE (He et al., CVPR 2022, appendix A.1). Each distillation term is weighted for the
current step.

B batch   C classes   s image side   K terms
"""

from collections.abc import Collection, Mapping, Sequence
from math import log
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from maedistill.finetuning.outputs import Outputs, RequestedOutputs, forward_outputs
from maedistill.finetuning.term import Parts, Term
from maedistill.losses.self_distillation import mutual_loss
from maedistill.methods.mae import Losses
from maedistill.models.vits import PlainViT, TimmModel


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
        predicts: bool = False,
    ) -> None:
        """Set up the module. requested: the student's outputs that the terms need, logits included. scheduled: terms
        whose weights change over time; these weights are logged beside the losses. predicts: whether to return the
        student's probabilities [B, C] too, as `predictions`.
        """
        super().__init__()
        assert requested.logits
        self.vit = vit
        self.cross_entropy = SoftTargetCrossEntropy()
        self.terms: Any = nn.ModuleDict(terms)  # torch would type its values as Module, not Term
        self.requested, self.label_weight, self.scheduled = requested, label_weight, frozenset(scheduled)
        self.predicts = predicts

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        teachers: Sequence[Outputs],
        weights: Tensor,
        extra: Outputs | None = None,
    ) -> Losses:
        """Return scalar losses. images: normalised, mixed, [B, 3, s, s]. targets: rows that sum to 1, [B, C]. teachers:
        their outputs on the same images; empty if every weight is 0. weights: of the terms in this step, [K]. extra:
        what terms without a teacher compare with, as the predictions of the network's own past (past.py).
        """
        outputs = forward_outputs(self.vit, images, self.requested)
        outputs["logits"] = outputs["logits"].float()
        losses: Losses = {}
        total = weights.new_zeros(())
        if self.label_weight:
            losses["cross_entropy"] = self.cross_entropy(outputs["logits"], targets)
            total = self.label_weight * losses["cross_entropy"]
        for i, term in enumerate(self.terms.values()):
            against = teachers if term.section.needs_teacher else [extra or {}]
            if not against:
                total = total + term.zero_loss(outputs["logits"])
                continue
            parts = _mean_over_teachers(
                [term(outputs, teacher, targets, number=n) for n, teacher in enumerate(against)]
            )
            losses |= parts
            total = total + weights[i] * term.total(parts)
        losses |= {f"weight/{name}": weights[i] for i, name in enumerate(self.terms) if name in self.scheduled}
        if self.predicts:
            losses["predictions"] = outputs["logits"].detach().softmax(dim=-1)
        return {"loss": total, **losses}


class Mutual(nn.Module):
    """Deep mutual learning (Zhang et al., CVPR 2018): each student learns from the labels and from its peers.

    `vit` is the config's own student, `peers` the others. Peers are detached, so a student's gradient is that of its
    own loss; a global clip of the gradient norm (`optim.clip`) is over all students together.
    """

    def __init__(
        self, vit: PlainViT, peers: Sequence[PlainViT], *, label_weight: float, is_scheduled: bool = False
    ) -> None:
        """Join the students. is_scheduled: the weight of the peers' predictions changes, and is logged."""
        super().__init__()
        self.vit, self.peers, self.label_weight = vit, nn.ModuleList(peers), label_weight
        self.is_scheduled = is_scheduled
        self.cross_entropy = SoftTargetCrossEntropy()

    def forward(self, images: Tensor, targets: Tensor, teachers: Sequence[Outputs], weights: Tensor) -> Losses:
        """Return scalar losses, of peer N as `peerN/...`. weights: of the peers' predictions in this step, [1]."""
        students = [self.vit, *self.peers]
        each = [student(images).float() for student in students]  # [B, C] each; all students see the same images
        losses: Losses = {}
        total = weights.new_zeros(())
        for i, logits in enumerate(each):
            name = f"peer{i}/" if i else ""
            divergence = mutual_loss(logits, [other for j, other in enumerate(each) if j != i])
            losses[f"{name}mutual"] = divergence
            total = total + weights[0] * divergence
            if self.label_weight:
                losses[f"{name}cross_entropy"] = self.cross_entropy(logits, targets)
                total = total + self.label_weight * losses[f"{name}cross_entropy"]
        losses |= {"weight/mutual": weights[0]} if self.is_scheduled else {}
        return {"loss": total, **losses}


class Ensemble(nn.Module):
    """Several networks in one: the logarithm of their mean probabilities."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """Return log-probabilities [B, C] of normalised images [B, 3, s, s]."""
        each = torch.stack([network(images).float().log_softmax(-1) for network in self.networks])
        return each.logsumexp(0) - log(len(self.networks))


def _mean_over_teachers(each: Sequence[Parts]) -> Parts:
    """Average the parts of a term over teachers; the parts of all teachers have the same names."""
    return {name: torch.stack([parts[name] for parts in each]).mean() for name in each[0]}
