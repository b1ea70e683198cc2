"""The terms of distillation from a teacher: each compares certain outputs of the student with the teacher's.

Hints, contrast and a distillation token have parameters of their own, which are trained with the student and discarded
afterwards. TERMS has each term by the name of its section in `config/distill.py`, those without a teacher
(`self_terms.py`) too. CONTRIBUTING.md says how to add one.

B batch   C classes   D width   P prefix tokens   N patches   h, w sides of the grid
"""

from collections.abc import Sequence
from math import gcd

from torch import Tensor, nn

from maedistill.config import distill
from maedistill.errors import ConfigError
from maedistill.finetuning.outputs import FeatureInfo, Outputs
from maedistill.finetuning.self_terms import Codistilled, Exits, PastTargets, SelfAttention
from maedistill.finetuning.term import Parts, Term
from maedistill.losses.features import attention_transfer_loss, feature_loss
from maedistill.losses.logits import decoupled_divergence, hard_label_loss, kd_loss, standardize
from maedistill.losses.relations import (
    contrast_loss,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    sp_loss,
    token_relations,
)
from maedistill.machine import without_autocast
from maedistill.models.blocks import projection

EMBEDDING_LOSSES = {
    "rkd_distance": rkd_distance_loss,
    "rkd_angle": rkd_angle_loss,
    "similarity_preserving": sp_loss,
    "pkt": pkt_loss,
}


def _logits(student: Outputs, teacher: Outputs, *, z_scores: bool) -> tuple[Tensor, Tensor]:
    """Return both sides' logits [B, C], z-scored per image if asked."""
    s, t = student["logits"], teacher["logits"]
    return (standardize(s.float()), standardize(t.float())) if z_scores else (s, t)


class Logits(Term):
    """KD (Hinton et al., 2015), without labels."""

    section: distill.LogitsConfig

    def _losses(self, student: Outputs, teacher: Outputs, targets: Tensor, number: int) -> Parts:
        sides = _logits(student, teacher, z_scores=self.section.standardize)
        return {"": kd_loss(*sides, temperature=self.section.temperature)}


class DKD(Term):
    """DKD (Zhao et al., CVPR 2022). Its parts, `dkd/tckd` and `dkd/nckd`, are logged before alpha and beta."""

    section: distill.DKDConfig

    def _losses(self, student: Outputs, teacher: Outputs, targets: Tensor, number: int) -> Parts:
        sides = _logits(student, teacher, z_scores=self.section.standardize)
        labels = targets.argmax(dim=1)  # [B]: for a mixed image, the class with the larger share
        losses = decoupled_divergence(*sides, labels, temperature=self.section.temperature)
        return {"/tckd": losses.target, "/nckd": losses.others}

    def total(self, parts: Parts) -> Tensor:
        """Return alpha TCKD + beta NCKD."""
        return self.section.alpha * parts["dkd/tckd"] + self.section.beta * parts["dkd/nckd"]


class HardLabel(Term):
    """DeiT's hard labels (Touvron et al., 2021), for the classifier or for a distillation token with its own head.

    The token is the first register token.
    """

    section: distill.HardLabelConfig

    def _build(self, student: FeatureInfo, teachers: Sequence[FeatureInfo]) -> None:
        if not self.section.token:
            return
        if student.register_token is None:
            raise ConfigError(
                "distill.hard_label.token: the student has no register token for the distillation",
                "set student.register_tokens=1 (from scratch), use weights that have one, or set "
                "distill.hard_label.token=false",
            )
        self.token, width = student.register_token, student.channels[0]
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, student.num_classes))

    def _losses(self, student: Outputs, teacher: Outputs, targets: Tensor, number: int) -> Parts:
        logits = self.head(student["tokens"][:, self.token]) if self.section.token else student["logits"]  # [B, C]
        return {"": hard_label_loss(logits, teacher["logits"])}


class Hints(Term):
    """FitNets (Romero et al., 2015): projected student tokens match the teacher's features at the same position.

    There is one projector per teacher and pair, and one part per pair, `hints/STUDENT-TEACHER`.
    """

    section: distill.HintsConfig

    def _build(self, student: FeatureInfo, teachers: Sequence[FeatureInfo]) -> None:
        kind = self.section.projector
        self.projectors = nn.ModuleList(
            nn.ModuleList(
                projection(student.channels[s], teacher.channels[t], kind=kind) for s, t in self.section.pairs
            )
            for teacher in teachers
        )

    def _losses(self, student: Outputs, teacher: Outputs, targets: Tensor, number: int) -> Parts:
        parts, section = {}, self.section
        projectors = self.projectors[number]
        assert isinstance(projectors, nn.ModuleList)
        for projector, (s, t) in zip(projectors, section.pairs, strict=True):
            rows, expected = (side.flatten(2).mT for side in (student[f"features/{s}"], teacher[f"features/{t}"]))
            projected = projector(rows)  # [B, N, D], as `expected`
            parts[f"/{s}-{t}"] = feature_loss(projected, expected, distance="mse", normalize=section.normalize)
        return parts


class AttentionTransfer(Term):
    """Attention transfer of activation maps (Zagoruyko & Komodakis, ICLR 2017), one part per pair.

    As `attention`, it compares a ViT's own attention instead: what each patch receives, mean over heads.
    """

    section: distill.AttentionTransferConfig | distill.AttentionConfig

    def _losses(self, student: Outputs, teacher: Outputs, targets: Tensor, number: int) -> Parts:
        section = self.section
        kind, power = ("features", 2) if isinstance(section, distill.AttentionTransferConfig) else ("attention", 1)
        return {
            f"/{s}-{t}": attention_transfer_loss(student[f"{kind}/{s}"], teacher[f"{kind}/{t}"], power=power)
            for s, t in section.pairs
        }


class TokenRelations(Term):
    """Query-key and value-value relations of patch tokens (TinyMIM, Ren et al., CVPR 2023).

    The parts are `token_relations/STUDENT-TEACHER/qk` and `.../vv`. For each teacher, both sides are split into as many
    heads as the section says, by default the teacher's.
    """

    section: distill.TokenRelationsConfig

    def _build(self, student: FeatureInfo, teachers: Sequence[FeatureInfo]) -> None:
        depth, own, width = self.section.teacher[0], student.grids[0], student.channels[0]
        self.num_heads: list[int] = []
        for teacher in teachers:
            grid = teacher.grids[depth]
            if grid != own:
                raise ConfigError(
                    f"distill.token_relations: {teacher.name} sees {grid} x {grid} patches, the student {own} x {own}",
                    f"set distill.image_size={teacher.image_size // grid * own}, so that both have the same grid",
                )
            teacher_width, teacher_heads = teacher.channels[depth], teacher.num_heads[depth]
            num_heads = self.section.num_heads or teacher_heads
            if width % num_heads or teacher_width % num_heads:
                divisor = gcd(width, teacher_width, teacher_heads)
                raise ConfigError(
                    f"distill.token_relations.num_heads: {num_heads} heads do not divide the widths {width} and "
                    f"{teacher_width}",
                    f"use a divisor of both, e.g. distill.token_relations.num_heads={divisor}",
                )
            self.num_heads.append(num_heads)

    def _losses(self, student: Outputs, teacher: Outputs, targets: Tensor, number: int) -> Parts:
        parts: Parts = {}
        for s, t in self.section.pairs:
            sides = [
                [side[f"{name}/{block}"] for name in ("query", "key", "value")]
                for side, block in ((student, s), (teacher, t))
            ]  # [B, H, N, d] each
            losses = token_relations(*sides, num_heads=self.num_heads[number])
            parts |= {f"/{s}-{t}/qk": losses.qk, f"/{s}-{t}/vv": losses.vv}
        return parts

    def total(self, parts: Parts) -> Tensor:
        """Return QK + VV, averaged over pairs."""
        return 2 * super().total(parts)


class Embeddings(Term):
    """A loss on relations between the images of a micro-batch, computed from pooled features [B, D]."""

    def _losses(self, student: Outputs, teacher: Outputs, targets: Tensor, number: int) -> Parts:
        with without_autocast(student["embedding"]):  # bf16 would lose small differences
            return {"": EMBEDDING_LOSSES[self.name](student["embedding"], teacher["embedding"])}


class Contrastive(Term):
    """Contrastive loss after CRD (Tian et al., ICLR 2020) within a micro-batch, on projected pooled features.

    There is one pair of projections per teacher, to the section's `width`.
    """

    section: distill.ContrastiveConfig

    def _build(self, student: FeatureInfo, teachers: Sequence[FeatureInfo]) -> None:
        width = self.section.width
        self.student = nn.ModuleList(nn.Linear(student.embedding, width) for _ in teachers)
        self.teacher = nn.ModuleList(nn.Linear(teacher.embedding, width) for teacher in teachers)

    def _losses(self, student: Outputs, teacher: Outputs, targets: Tensor, number: int) -> Parts:
        rows = student["embedding"]  # [B, D]
        sides = self.student[number](rows), self.teacher[number](teacher["embedding"].to(rows.dtype))
        with without_autocast(rows):
            return {"": contrast_loss(*sides, temperature=self.section.temperature)}


TERMS: dict[str, type[Term]] = {
    "logits": Logits,
    "dkd": DKD,
    "hard_label": HardLabel,
    "hints": Hints,
    "attention_transfer": AttentionTransfer,
    "attention": AttentionTransfer,
    "token_relations": TokenRelations,
    **dict.fromkeys(EMBEDDING_LOSSES, Embeddings),
    "contrastive": Contrastive,
    "exits": Exits,
    "self_attention": SelfAttention,
    "codistillation": Codistilled,
    "past": PastTargets,
}
