"""The terms of self-distillation: the student learns from its own deeper layers or its past, without a teacher.

B batch   C classes   D width   P prefix tokens   N patches
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maedistill.config import distill
from maedistill.errors import ConfigError
from maedistill.finetuning.outputs import FeatureInfo, Outputs
from maedistill.finetuning.term import Parts, Term
from maedistill.losses.features import feature_loss
from maedistill.losses.logits import kd_loss
from maedistill.losses.self_distillation import codistillation_loss, past_target, self_attention_loss
from maedistill.models.exits import ExitHead, ending_at


class Exits(Term):
    """Exits that learn from labels and from the final classifier (Be Your Own Teacher, Zhang et al., ICCV 2019).

    An exit's parts are `exits/BLOCK/cross_entropy`, `.../divergence` (T^2 included) and `.../features`, those whose
    weight is not 0. Their heads are kept: `evaluate` and `export` use them.
    """

    section: distill.ExitsConfig

    def _build(self, student: FeatureInfo, teachers: Sequence[FeatureInfo]) -> None:
        assert student.vit is not None
        own_block = self.section.own_block
        heads = {str(block): ExitHead(student.vit, own_block=own_block) for block in student.exits}
        self.heads: Any = nn.ModuleDict(heads)
        self.cross_entropy = SoftTargetCrossEntropy()

    def _losses(self, student: Outputs, teacher: Outputs, targets: Tensor, number: int) -> Parts:
        section, parts = self.section, {}
        for block, head in self.heads.items():
            tokens = student[f"tokens/{block}"]
            features, logits = head(tokens if section.trunk_gradients else tokens.detach())  # [B, D], [B, C]
            if section.alpha < 1:
                parts[f"/{block}/cross_entropy"] = self.cross_entropy(logits.float(), targets)
            if section.alpha > 0:
                parts[f"/{block}/divergence"] = kd_loss(logits, student["logits"], temperature=section.temperature)
            if section.feature_weight > 0:
                parts[f"/{block}/features"] = feature_loss(
                    features, student["embedding"], distance="mse", normalize="whiten", eps=1e-6
                )
        return parts

    def total(self, parts: Parts) -> Tensor:
        """Return the sum over exits of (1 - alpha) CE + alpha T^2 KL, plus the weighted mean of feature distances."""
        section = self.section
        shares = {"cross_entropy": 1 - section.alpha, "divergence": section.alpha}
        shares |= {"features": section.feature_weight / len(self.heads)}
        return torch.stack([shares[name.rpartition("/")[2]] * part for name, part in parts.items()]).sum()


def exit_networks(module: Any) -> dict[str, VisionTransformer]:
    """Return the network that ends at each exit of what is trained, sharing its weights, by name: `exit5_`."""
    terms: Any = getattr(module, "terms", {})
    heads = terms["exits"].heads.items() if "exits" in terms else ()
    return {f"exit{block}_": ending_at(module.vit, int(block), head) for block, head in heads}


class SelfAttention(Term):
    """SAD (Hou et al., ICCV 2019): the activation map of each of the section's blocks imitates the next one's."""

    section: distill.SelfAttentionConfig

    def _build(self, student: FeatureInfo, teachers: Sequence[FeatureInfo]) -> None:
        if max(self.section.blocks) >= len(student.channels):
            raise ConfigError(
                f"distill.self_attention.blocks: block {max(self.section.blocks)} does not exist, the student has "
                f"{len(student.channels)}",
                f"use 0 to {len(student.channels) - 1}",
            )

    def _losses(self, student: Outputs, teacher: Outputs, targets: Tensor, number: int) -> Parts:
        tokens = [student[f"features/{block}"].flatten(2).mT for block in self.section.blocks]  # [B, N, D] each
        return {"": self_attention_loss(tokens)}


class Codistilled(Term):
    """KL to the mean prediction of runs that train at the same time (codistillation, Anil et al., ICLR 2018).

    The peers' outputs are those of `codistillation.py`. Without them, during burn-in, it is 0.
    """

    def _losses(self, student: Outputs, teacher: Outputs, targets: Tensor, number: int) -> Parts:
        logits = student["logits"]
        return {"": codistillation_loss(logits, list(teacher["peers"])) if "peers" in teacher else logits.new_zeros(())}


class PastTargets(Term):
    """Cross-entropy with targets that are mixed with predictions of the past (PS-KD, Kim et al., ICCV 2021).

    The past's outputs are those of `past.py` or `predictions.py`. Without them, in the first epoch, it is the
    cross-entropy with the labels, bit for bit.
    """

    def _build(self, student: FeatureInfo, teachers: Sequence[FeatureInfo]) -> None:
        self.cross_entropy = SoftTargetCrossEntropy()

    def _losses(self, student: Outputs, teacher: Outputs, targets: Tensor, number: int) -> Parts:
        if "past" in teacher:
            targets = past_target(targets, teacher["past"], alpha=teacher["share"])
        return {"": self.cross_entropy(student["logits"], targets)}
