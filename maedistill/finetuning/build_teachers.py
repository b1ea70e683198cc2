"""Builders that turn a fine-tuning config into teachers and terms, each checked against the actual networks.

distill.teachers -> open_teachers -> build_module (what is trained) and build_teaching (frozen, beside the engine)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import torch
from timm.models.vision_transformer import VisionTransformer

from maedistill.config.distill import BATCH_RELATION_TERMS, Distill
from maedistill.config.finetune import FinetuneConfig
from maedistill.errors import ConfigError, UserError
from maedistill.finetuning import terms
from maedistill.finetuning.distilled import Distilled
from maedistill.finetuning.outputs import FeatureInfo, RequestedOutputs, anatomy
from maedistill.finetuning.supervised import Supervised
from maedistill.finetuning.teacher import OfflineTeacher
from maedistill.finetuning.teacher_ensemble import TeacherEnsemble
from maedistill.finetuning.term_schedule import Schedule
from maedistill.machine import DTYPES, precision
from maedistill.models.initialize import initialize
from maedistill.runs.plan import Plan
from maedistill.weights.classifier import open_classifier
from maedistill.weights.fingerprint import weights_fingerprint
from maedistill.weights.network import Network
from maedistill.weights.shared_classes import shared_classes

Triple = tuple[float, float, float]
_FEATURES, _VIT_ONLY = ("hints", "attention_transfer"), ("attention", "token_relations")  # terms on pairs of depths
_SCHEDULE = frozenset({"weight", "start_epoch", "warmup_epochs", "stop_epoch"})


@dataclass(frozen=True)
class TeacherSource:
    """An opened teacher. classes: indices of its outputs for the student's classes, None if the classes are the same.

    fingerprint: of its weights.
    """

    classifier: Network
    anatomy: FeatureInfo
    classes: tuple[int, ...] | None
    fingerprint: str

    def describe(self) -> str:
        """Return one line for the log: the network, its image size and normalisation, the classes in use."""
        opened = self.classifier
        subset = f", {len(self.classes)} of its classes" if self.classes is not None else ""
        return f"{opened.describe()}  sees {opened.size} px, mean {opened.mean}{subset}"


def open_teachers(config: FinetuneConfig, *, classes: tuple[str, ...], num_classes: int) -> list[TeacherSource]:
    """Open the teachers that the config names. classes: names of the student's classes, empty if unknown.

    Raises ConfigError for a teacher that lacks what the terms compare, DataError for weights that cannot be loaded.
    """
    distill, found = config.distill, []
    for source in distill.teachers:
        opened = _open_teacher(distill, source)
        shown = anatomy(opened.module, image_size=opened.size)
        _require_views(distill, opened.name, shown)
        shared = shared_classes(opened, classes, num_classes=num_classes) if distill.logit_terms else None
        found.append(TeacherSource(opened, shown, shared, weights_fingerprint(opened.module)))
    return found


def build_module(config: FinetuneConfig, vit: VisionTransformer, teachers: list[TeacherSource]) -> Supervised:
    """Build what the engine trains: the network, and with teachers its terms, initialised from the seed."""
    if not teachers:
        return Supervised(vit)
    distill = config.distill
    student = anatomy(vit, image_size=vit.patch_embed.img_size[0])
    _require_depths(distill, "student", "the student", student)
    built = {name: _build_term(distill, name, vit, student, teachers) for name in distill.terms}
    wanted = _wanted(distill, "student", logits=True, tokens=distill.hard_label.on and distill.hard_label.token)
    scheduled = [name for name, schedule in schedules(distill).items() if schedule.changes]
    module = Distilled(vit, built, wanted=wanted, label_weight=distill.label_weight, scheduled=scheduled)
    initialize(module.terms, seed=config.seed)
    return module


def build_teaching(
    config: FinetuneConfig,
    teachers: list[TeacherSource],
    *,
    grid: int,
    plan: Plan,
    mean: Triple,
    std: Triple,
    device: torch.device,
) -> TeacherEnsemble | None:
    """Build the teachers on `device` and the schedules of the terms; None without a teacher.

    grid: side of the student's patch grid. mean, std: the student's normalisation. Raises ConfigError where a term
    relates the images of a micro-batch and there is only one.
    """
    if not teachers:
        return None
    distill = config.distill
    related = [name for name in BATCH_RELATION_TERMS if name in distill.terms]
    if related and plan.batch.micro_batch < 2:
        raise ConfigError(
            f"engine.micro_batch: 1 image a micro-batch has no relation to others, as distill.{related[0]} needs",
            "use a larger optim.global_batch, or fewer ranks",
        )
    wanted = _wanted(distill, "teacher", logits=bool(distill.logit_terms), tokens=False)
    dtype = DTYPES[precision(distill.precision, device)]
    frozen = [
        OfflineTeacher(
            teacher.classifier,
            wanted=wanted,
            student_mean=mean,
            student_std=std,
            student_grid=grid,
            classes=teacher.classes,
            dtype=dtype,
        ).to(device)
        for teacher in teachers
    ]
    return TeacherEnsemble(frozen, schedules(distill), steps=plan.steps, epoch_at=plan.epoch_at, device=device)


def schedules(distill: Distill) -> dict[str, Schedule]:
    """Return the schedule of each term that is on."""
    return {name: Schedule(**term.model_dump(include=_SCHEDULE)) for name, term in distill.terms.items()}


def distillation_lines(config: FinetuneConfig, teachers: list[TeacherSource], *, micro_batch: int) -> list[str]:
    """Describe the teachers and terms, one per line; empty without a teacher."""
    distill = config.distill
    if not teachers:
        return []
    lines = [f"teacher  {teacher.describe()}" for teacher in teachers]
    lines.append(f"labels   weight {distill.label_weight:g}" + ("" if distill.reads_labels else ", none is read"))
    for name, schedule in schedules(distill).items():
        section = distill.terms[name].model_dump(exclude=_SCHEDULE, exclude_none=True)
        settings = "".join(f", {key} {_plain(value)}" for key, value in section.items())
        related = f", within micro-batches of {micro_batch}" if name in BATCH_RELATION_TERMS else ""
        lines.append(f"term     {name} {schedule.describe()}{settings}{related}")
    return lines


def _build_term(
    distill: Distill, name: str, vit: VisionTransformer, student: FeatureInfo, teachers: list[TeacherSource]
) -> terms.Term:
    """Build the term called `name` for these networks."""
    section = getattr(distill, name)
    given = section.model_dump(exclude={*_SCHEDULE, "student", "teacher"})
    if name == "contrastive":
        widths = [teacher.anatomy.embedding for teacher in teachers]
        return terms.Contrastive(student_width=vit.embed_dim, teacher_widths=widths, **given)
    if name in terms.EMBEDDING_LOSSES:
        return terms.Embeddings(name)
    if name == "hard_label":
        token = _token(vit) if section.token else None
        return terms.HardLabel(token=token, width=vit.embed_dim, num_classes=vit.num_classes)
    if name in ("logits", "dkd"):
        return {"logits": terms.Logits, "dkd": terms.DKD}[name](**given)
    pairs = tuple(zip(section.student, section.teacher, strict=True))
    if name == "hints":
        widths = [[teacher.anatomy.channels[depth] for depth in section.teacher] for teacher in teachers]
        return terms.Hints(pairs, student_width=vit.embed_dim, teacher_widths=widths, **given)
    if name == "token_relations":
        return terms.TokenRelations(pairs, num_heads=[_relation_heads(section, student, t) for t in teachers])
    return {"attention_transfer": terms.AttentionTransfer, "attention": terms.Attention}[name](pairs, **given)


def _wanted(distill: Distill, side: str, *, logits: bool, tokens: bool) -> RequestedOutputs:
    """Return the outputs that the terms need of the `student` or of a `teacher`."""

    def depths(names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(sorted({depth for name, found in _paired(distill, side) for depth in found if name in names}))

    return RequestedOutputs(
        logits=logits,
        embedding=any(name in distill.terms for name in BATCH_RELATION_TERMS),
        tokens=tokens,
        features=depths(_FEATURES),
        attention=depths(("attention",)),
        relations=depths(("token_relations",)),
    )


def _paired(distill: Distill, side: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, depths) of each term on pairs of depths, for one side."""
    for name, term in distill.terms.items():
        if name in (*_FEATURES, *_VIT_ONLY):
            yield name, getattr(term, side)


def _open_teacher(distill: Distill, source: str) -> Network:
    """Open one teacher. Raises ConfigError if a term compares predictions and it has no classifier."""
    try:
        opened = open_classifier(source, headless=True, image_size=distill.image_size, size_key="distill.image_size")
    except UserError as error:
        raise type(error)(f"distill.teachers: {error.cause}", error.remedy) from error
    if distill.logit_terms and not opened.num_classes:
        raise ConfigError(
            f"distill.teachers: {source} has no classifier, and distill.{distill.logit_terms[0]} compares predictions",
            "fine-tune it first (tools/finetune.py) and name that run, or leave out the terms on predictions",
        )
    return opened


def _require_views(distill: Distill, name: str, shown: FeatureInfo) -> None:
    """Raise ConfigError if a teacher does not have the outputs that a term compares."""
    related = [term for term in BATCH_RELATION_TERMS if term in distill.terms]
    if related and not shown.embedding:
        remedy = "use another teacher, or leave out this term"
        raise ConfigError(f"distill.{related[0]}: {name} gives no pooled features", remedy)
    _require_depths(distill, "teacher", name, shown)


def _require_depths(distill: Distill, side: str, name: str, shown: FeatureInfo) -> None:
    """Raise ConfigError for a depth that does not exist, or a block without the attention that a term needs."""
    for term, depths in _paired(distill, side):
        key = f"distill.{term}.{side}"
        if not shown.channels:
            remedy = "use another teacher, or terms on logits alone"
            raise ConfigError(f"{key}: {name} gives no features by depth", remedy)
        if max(depths) >= len(shown.channels):
            raise ConfigError(
                f"{key}: depth {max(depths)} does not exist, {name} has {len(shown.channels)}",
                f"use 0 to {len(shown.channels) - 1}",
            )
        if term in _VIT_ONLY and not all(shown.num_heads[depth] if shown.num_heads else 0 for depth in depths):
            raise ConfigError(
                f"{key}: {name} has no attention maps that can be seen",
                "use a plain ViT, or distill.attention_transfer, which compares activations of any network",
            )


def _relation_heads(section: object, student: FeatureInfo, teacher: TeacherSource) -> int:
    """Return how many heads token relations are split into. Raises ConfigError if grids differ or no number fits."""
    shown, name = teacher.anatomy, teacher.classifier.name
    depth = section.teacher[0]
    if shown.grids[depth] != student.grids[0]:
        raise ConfigError(
            f"distill.token_relations: {name} sees {shown.grids[depth]} x {shown.grids[depth]} patches, the student "
            f"{student.grids[0]} x {student.grids[0]}",
            f"set distill.image_size={teacher.classifier.size // shown.grids[depth] * student.grids[0]}, so that both "
            "have the same grid",
        )
    num_heads, widths = section.num_heads or shown.num_heads[depth], (student.channels[0], shown.channels[depth])
    if any(width % num_heads for width in widths):
        raise ConfigError(
            f"distill.token_relations.num_heads: {num_heads} heads do not divide the widths {widths[0]} and "
            f"{widths[1]}",
            f"use a divisor of both, e.g. distill.token_relations.num_heads={gcd(*widths, shown.num_heads[depth])}",
        )
    return num_heads


def _token(vit: VisionTransformer) -> int:
    """Return the index of the distillation token, the first register token. Raises ConfigError without one."""
    if vit.reg_token is None:
        raise ConfigError(
            "distill.hard_label.token: the student has no register token to distil through",
            "set student.register_tokens=1 (from scratch), weights that have one, or distill.hard_label.token=false",
        )
    return int(vit.cls_token is not None)


def _plain(value: object) -> str:
    """Format a setting for the lines at the start of a run: `[3, 5]`, `0.5`."""
    return str(list(value)) if isinstance(value, tuple) else f"{value:g}" if type(value) is float else str(value)
