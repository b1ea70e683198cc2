"""Distillation terms: each compares certain outputs of the student with those of a teacher, by its own loss.

    term(student outputs, teacher outputs, labels, number=i) -> {name: scalar}, the term's parts, each logged by itself
    term.total(parts) -> scalar, which the term's weight multiplies

Outputs are those of `outputs.py`, the teacher's grids resampled to the student's. Hints, contrast and a distillation
token have parameters of their own, which are trained with the student and discarded afterwards.

B batch   C classes   D width   P prefix tokens   N patches   h, w sides of the grid
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from maedistill.finetuning.outputs import Outputs
from maedistill.losses.features import attention_transfer_loss, feature_loss
from maedistill.losses.logits import decoupled_divergence, divergence, hard_label_loss, standardize
from maedistill.losses.relations import (
    contrast_loss,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    sp_loss,
    token_relations,
)
from maedistill.machine import without_autocast
from maedistill.models.heads import projection

Parts = dict[str, Tensor]
Pairs = Sequence[tuple[int, int]]  # (student depth, teacher depth)
EMBEDDING_LOSSES = {
    "rkd_distance": rkd_distance_loss,
    "rkd_angle": rkd_angle_loss,
    "similarity_preserving": sp_loss,
    "pkt": pkt_loss,
}


class Term(nn.Module):
    """One distillation term. Its parts count equally: the total is their mean, e.g. over pairs of depths."""

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """Return the parts by name. labels: int64 [B]. number: index of the teacher among several, from 0."""
        raise NotImplementedError

    def idle(self, student: Outputs) -> Tensor | int:
        """Return a zero that depends on every parameter of the term; without it ZeRO may reuse a stale gradient."""
        return 0

    def total(self, parts: Parts) -> Tensor:
        """Return the value that the term's weight multiplies."""
        return torch.stack(list(parts.values())).mean()


class Logits(Term):
    """KD (Hinton et al., 2015), without labels."""

    def __init__(self, *, temperature: float, teacher_temperature: float | None, standardize: bool) -> None:
        super().__init__()
        self.temperatures = {
            "temperature": temperature,
            "teacher_temperature": teacher_temperature if teacher_temperature is not None else temperature,
        }
        self.standardize = standardize

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """Return the part `logits`."""
        return {"logits": divergence(*_logits(student, teacher, self.standardize), **self.temperatures)}


class DKD(Term):
    """DKD (Zhao et al., CVPR 2022), its two parts logged separately."""

    def __init__(self, *, alpha: float, beta: float, temperature: float, standardize: bool) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.temperature, self.standardize = temperature, standardize

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """Return the parts `dkd/tckd` and `dkd/nckd`, before alpha and beta."""
        logits = _logits(student, teacher, self.standardize)
        parts = decoupled_divergence(*logits, labels, temperature=self.temperature)
        return {"dkd/tckd": parts.target, "dkd/nckd": parts.others}

    def total(self, parts: Parts) -> Tensor:
        """Return alpha TCKD + beta NCKD."""
        return self.alpha * parts["dkd/tckd"] + self.beta * parts["dkd/nckd"]


class HardLabel(Term):
    """DeiT's hard labels (Touvron et al., 2021), for the classifier or for a distillation token with its own head."""

    def __init__(self, *, token: int | None, width: int, num_classes: int) -> None:
        super().__init__()
        self.token = token  # index among the prefix tokens
        if token is not None:
            self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """Return the part `hard`."""
        logits = student["logits"] if self.token is None else self.head(student["tokens"][:, self.token])  # [B, C]
        return {"hard_label": hard_label_loss(logits, teacher["logits"])}

    def idle(self, student: Outputs) -> Tensor | int:
        """Return 0, computed through the head."""
        return 0 if self.token is None else 0 * self.head(student["tokens"][:1, self.token]).sum()


class Hints(Term):
    """FitNets (Romero et al., 2015): projected student tokens match the teacher's features at the same position."""

    def __init__(
        self,
        pairs: Pairs,
        *,
        student_width: int,
        teacher_widths: Sequence[Sequence[int]],
        projector: str,
        distance: str,
        normalize: str,
    ) -> None:
        """Build one projector per teacher and pair. teacher_widths: for each teacher, the width of each pair."""
        super().__init__()
        self.pairs, self.distance = tuple(pairs), {"distance": distance, "normalize": normalize}
        self.projectors = nn.ModuleList(
            nn.ModuleList(projection(student_width, width, kind=projector, bias=True) for width in widths)
            for widths in teacher_widths
        )

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """Return the part `hints/STUDENT-TEACHER` for each pair."""
        parts = {}
        for projector, (s, t) in zip(self.projectors[number], self.pairs, strict=True):
            rows, expected = (side.flatten(2).mT for side in (student[f"features/{s}"], teacher[f"features/{t}"]))
            parts[f"hints/{s}-{t}"] = feature_loss(projector(rows), expected, **self.distance)  # [B, N, D] each
        return parts

    def idle(self, student: Outputs) -> Tensor | int:
        """Return 0, computed through each projector."""
        rows = {s: student[f"features/{s}"].flatten(2).mT[:1, :1] for s, _ in self.pairs}  # [1, 1, D]
        return 0 * sum(
            projector(rows[s]).sum()
            for projectors in self.projectors
            for projector, (s, _) in zip(projectors, self.pairs, strict=True)
        )


class AttentionTransfer(Term):
    """Attention transfer of activation maps (Zagoruyko & Komodakis, ICLR 2017)."""

    def __init__(self, pairs: Pairs, *, power: int) -> None:
        super().__init__()
        self.pairs, self.power = tuple(pairs), power

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """Return the part `maps/STUDENT-TEACHER` for each pair."""
        return {
            f"attention_transfer/{s}-{t}": attention_transfer_loss(
                student[f"features/{s}"], teacher[f"features/{t}"], power=self.power
            )
            for s, t in self.pairs
        }


class Attention(Term):
    """Attention transfer of a ViT's own attention: the attention that each patch receives, mean over heads."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__()
        self.pairs = tuple(pairs)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """Return the part `attention/STUDENT-TEACHER` for each pair."""
        return {
            f"attention/{s}-{t}": attention_transfer_loss(student[f"attention/{s}"], teacher[f"attention/{t}"], power=1)
            for s, t in self.pairs
        }


class TokenRelations(Term):
    """Query-key and value-value relations of patch tokens (TinyMIM, Ren et al., CVPR 2023)."""

    def __init__(self, pairs: Pairs, *, num_heads: Sequence[int]) -> None:
        """Store the pairs. num_heads: for each teacher, how many heads both sides are split into."""
        super().__init__()
        self.pairs, self.num_heads = tuple(pairs), tuple(num_heads)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """Return the parts `relations/STUDENT-TEACHER/qk` and `.../vv` for each pair."""
        parts = {}
        for s, t in self.pairs:
            sides = [
                [side[f"{name}/{block}"] for name in ("query", "key", "value")]
                for side, block in ((student, s), (teacher, t))
            ]  # [B, H, N, d] each
            found = token_relations(*sides, num_heads=self.num_heads[number])
            parts |= {f"token_relations/{s}-{t}/qk": found.qk, f"token_relations/{s}-{t}/vv": found.vv}
        return parts

    def total(self, parts: Parts) -> Tensor:
        """Return QK + VV, averaged over pairs."""
        return 2 * super().total(parts)


class Embeddings(Term):
    """A loss on relations between the images of a micro-batch, computed from pooled features."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.loss: Callable[[Tensor, Tensor], Tensor] = EMBEDDING_LOSSES[name]

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """Return one part, under the term's name."""
        sides = student["embedding"], teacher["embedding"]
        with without_autocast(sides[0]):  # bf16 would lose small differences
            return {self.name: self.loss(*sides)}


class Contrastive(Term):
    """Contrastive loss after CRD (Tian et al., ICLR 2020) within a micro-batch, on projected pooled features."""

    def __init__(self, *, student_width: int, teacher_widths: Sequence[int], width: int, temperature: float) -> None:
        """Build the projections. teacher_widths: one for each teacher. width: of both sides after projection."""
        super().__init__()
        self.temperature = temperature
        self.student = nn.ModuleList(nn.Linear(student_width, width) for _ in teacher_widths)
        self.teacher = nn.ModuleList(nn.Linear(teacher_width, width) for teacher_width in teacher_widths)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """Return the part `contrast`."""
        rows = student["embedding"]  # [B, D]
        sides = self.student[number](rows), self.teacher[number](teacher["embedding"].to(rows.dtype))
        with without_autocast(rows):
            return {"contrastive": contrast_loss(*sides, temperature=self.temperature)}

    def idle(self, student: Outputs) -> Tensor | int:
        """Return 0, computed through each projection."""
        row = student["embedding"][:1]  # [1, D]
        sides = zip(self.student, self.teacher, strict=True)
        return 0 * sum(own(row).sum() + other(row.new_zeros(1, other.in_features)).sum() for own, other in sides)


def _logits(student: Outputs, teacher: Outputs, standardized: bool) -> tuple[Tensor, Tensor]:
    """Return both sides' logits [B, C], as z-scores if `standardized`."""
    sides = student["logits"], teacher["logits"]
    return tuple(standardize(side.float()) for side in sides) if standardized else sides
