"""The terms of distillation: what of a teacher's view a student's view is compared with, and by which loss.

    term(student view, teacher view, labels, number=i) -> {name: scalar}, a term's parts, each logged by itself
    term.total(parts) -> scalar, what the term's weight multiplies

Outputs are those of `outputs.py`, the teacher's grids resampled to the student's. Hints, contrast and a distillation
token have parameters of their own, trained with the student and thrown away.

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
Pairs = Sequence[tuple[int, int]]  # depths of student and teacher
EMBEDDING_LOSSES = {
    "distances": rkd_distance_loss,
    "angles": rkd_angle_loss,
    "similarity": sp_loss,
    "affinity": pkt_loss,
}


class Term(nn.Module):
    """One thing that is imitated. Its parts count alike: of pairs of depths the mean is taken."""

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """The parts by name. labels: int64 [B]. number: which of several teachers it is, from 0."""
        raise NotImplementedError

    def idle(self, student: Outputs) -> Tensor | int:
        """0, with a gradient of 0 for each parameter of the term: ZeRO could apply that of an earlier step again."""
        return 0

    def total(self, parts: Parts) -> Tensor:
        """What the weight multiplies."""
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
        """{"logits"}."""
        return {"logits": divergence(*_logits(student, teacher, self.standardize), **self.temperatures)}


class DKD(Term):
    """DKD (Zhao et al., CVPR 2022), its two parts by themselves."""

    def __init__(self, *, alpha: float, beta: float, temperature: float, standardize: bool) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.temperature, self.standardize = temperature, standardize

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """{"dkd/tckd", "dkd/nckd"}, before alpha and beta."""
        logits = _logits(student, teacher, self.standardize)
        parts = decoupled_divergence(*logits, labels, temperature=self.temperature)
        return {"dkd/tckd": parts.target, "dkd/nckd": parts.others}

    def total(self, parts: Parts) -> Tensor:
        """alpha TCKD + beta NCKD."""
        return self.alpha * parts["dkd/tckd"] + self.beta * parts["dkd/nckd"]


class HardLabel(Term):
    """DeiT's hard labels (Touvron et al., 2021), for the classifier or for a distillation token with its own head."""

    def __init__(self, *, token: int | None, width: int, num_classes: int) -> None:
        super().__init__()
        self.token = token  # place among the prefix tokens
        if token is not None:
            self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """{"hard"}."""
        logits = student["logits"] if self.token is None else self.head(student["tokens"][:, self.token])  # [B, C]
        return {"hard": hard_label_loss(logits, teacher["logits"])}

    def idle(self, student: Outputs) -> Tensor | int:
        """0, through the head."""
        return 0 if self.token is None else 0 * self.head(student["tokens"][:1, self.token]).sum()


class Hints(Term):
    """FitNets (Romero et al., 2015): student tokens, projected, beside the teacher's features at the same place."""

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
        """teacher_widths: for each teacher, that of each pair."""
        super().__init__()
        self.pairs, self.distance = tuple(pairs), {"distance": distance, "normalize": normalize}
        self.projectors = nn.ModuleList(
            nn.ModuleList(projection(student_width, width, kind=projector, bias=True) for width in widths)
            for widths in teacher_widths
        )

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """{"hints/STUDENT-TEACHER"} for each pair."""
        parts = {}
        for projector, (s, t) in zip(self.projectors[number], self.pairs, strict=True):
            rows, expected = (side.flatten(2).mT for side in (student[f"features/{s}"], teacher[f"features/{t}"]))
            parts[f"hints/{s}-{t}"] = feature_loss(projector(rows), expected, **self.distance)  # [B, N, D] each
        return parts

    def idle(self, student: Outputs) -> Tensor | int:
        """0, through each projector."""
        rows = {s: student[f"features/{s}"].flatten(2).mT[:1, :1] for s, _ in self.pairs}  # [1, 1, D]
        return 0 * sum(
            projector(rows[s]).sum()
            for projectors in self.projectors
            for projector, (s, _) in zip(projectors, self.pairs, strict=True)
        )


class Maps(Term):
    """Attention transfer of activation maps (Zagoruyko & Komodakis, ICLR 2017)."""

    def __init__(self, pairs: Pairs, *, power: int) -> None:
        super().__init__()
        self.pairs, self.power = tuple(pairs), power

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """{"maps/STUDENT-TEACHER"} for each pair."""
        return {
            f"maps/{s}-{t}": attention_transfer_loss(
                student[f"features/{s}"], teacher[f"features/{t}"], power=self.power
            )
            for s, t in self.pairs
        }


class Attention(Term):
    """Attention transfer of a ViT's own attention: what each patch receives, mean over heads."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__()
        self.pairs = tuple(pairs)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """{"attention/STUDENT-TEACHER"} for each pair."""
        return {
            f"attention/{s}-{t}": attention_transfer_loss(student[f"attention/{s}"], teacher[f"attention/{t}"], power=1)
            for s, t in self.pairs
        }


class Relations(Term):
    """Token relations (TinyMIM, Ren et al., CVPR 2023): how patch tokens relate by queries and keys, and by values."""

    def __init__(self, pairs: Pairs, *, heads: Sequence[int]) -> None:
        """heads: for each teacher, how many heads both sides are cut into."""
        super().__init__()
        self.pairs, self.heads = tuple(pairs), tuple(heads)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """{"relations/STUDENT-TEACHER/qk", ".../vv"} for each pair."""
        parts = {}
        for s, t in self.pairs:
            sides = [
                [side[f"{name}/{block}"] for name in ("query", "key", "value")]
                for side, block in ((student, s), (teacher, t))
            ]  # [B, H, N, d] each
            found = token_relations(*sides, heads=self.heads[number])
            parts |= {f"relations/{s}-{t}/qk": found.qk, f"relations/{s}-{t}/vv": found.vv}
        return parts

    def total(self, parts: Parts) -> Tensor:
        """QK + VV, mean over pairs."""
        return 2 * super().total(parts)


class Embeddings(Term):
    """A relation between the images of a micro-batch, of their pooled features."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.loss: Callable[[Tensor, Tensor], Tensor] = EMBEDDING_LOSSES[name]

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """{its name}."""
        sides = student["embedding"], teacher["embedding"]
        with without_autocast(sides[0]):  # bf16 would lose small differences
            return {self.name: self.loss(*sides)}


class Contrast(Term):
    """Contrast after CRD (Tian et al., ICLR 2020) within a micro-batch, of pooled features that are projected."""

    def __init__(self, *, student_width: int, teacher_widths: Sequence[int], width: int, temperature: float) -> None:
        """teacher_widths: one for each teacher. width: that both sides are projected to."""
        super().__init__()
        self.temperature = temperature
        self.student = nn.ModuleList(nn.Linear(student_width, width) for _ in teacher_widths)
        self.teacher = nn.ModuleList(nn.Linear(teacher_width, width) for teacher_width in teacher_widths)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, *, number: int) -> Parts:
        """{"contrast"}."""
        rows = student["embedding"]  # [B, D]
        sides = self.student[number](rows), self.teacher[number](teacher["embedding"].to(rows.dtype))
        with without_autocast(rows):
            return {"contrast": contrast_loss(*sides, temperature=self.temperature)}

    def idle(self, student: Outputs) -> Tensor | int:
        """0, through each projection."""
        row = student["embedding"][:1]  # [1, D]
        sides = zip(self.student, self.teacher, strict=True)
        return 0 * sum(own(row).sum() + other(row.new_zeros(1, other.in_features)).sum() for own, other in sides)


def _logits(student: Outputs, teacher: Outputs, standardized: bool) -> tuple[Tensor, Tensor]:
    """Both sides' logits [B, C], Z-scored where asked for."""
    sides = student["logits"], teacher["logits"]
    return tuple(standardize(side.float()) for side in sides) if standardized else sides
