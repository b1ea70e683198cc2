"""Builders that turn the section `distill` into teachers, terms, past and peers, checked against the actual networks.

distill.teachers -> open_teachers -> build_module (what is trained) and build_teachers (frozen, beside the engine)
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from maedistill.config.distill import BATCH_RELATION_TERMS, DistillConfig, PairsConfig, TermConfig
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.plan import Plan
from maedistill.config.schema import Triple
from maedistill.errors import ConfigError, UserError
from maedistill.finetuning.codistillation import Codistillation
from maedistill.finetuning.objective import Distilled, Mutual, Supervised
from maedistill.finetuning.outputs import FeatureInfo, RequestedOutputs, feature_info, is_plain_vit
from maedistill.finetuning.past import Past
from maedistill.finetuning.peers import Peer
from maedistill.finetuning.predictions import Predictions
from maedistill.finetuning.teacher import OutputTeacher, TeacherSource
from maedistill.finetuning.terms import TERMS
from maedistill.machine import DTYPES, resolve_precision
from maedistill.models.initialize import initialize
from maedistill.models.vits import PlainViT
from maedistill.runs.objects import require_object
from maedistill.weights.class_names import shared_classes
from maedistill.weights.network import Network
from maedistill.weights.open_network import given_network, open_network
from maedistill.weights.state_dict import weights_fingerprint

_VIT_ONLY = ("attention", "token_relations")


def open_teachers(
    config: FinetuneConfig, given: Sequence[nn.Module] = (), *, classes: tuple[str, ...], num_classes: int
) -> list[TeacherSource]:
    """Open the teachers that the config names, or describe the caller's.

    given: the caller's, one for each name in the config. classes: names of the student's classes, empty if unknown.

    Raises ConfigError for a teacher that lacks what the terms compare, DataError for weights that cannot be loaded.
    """
    distill, teachers = config.distill, []
    for i, source in enumerate(distill.teachers):
        require_object("distill.teachers", source, given or None, argument="teacher")
        if given:
            size = distill.image_size or config.data.image_size
            network = given_network(given[i], source, image_size=size)
            network = replace(network, num_classes=network.output(size_key="distill.image_size").shape[-1])
        else:
            network = _open_teacher(distill, source, weights=distill.weights[i] if distill.weights else "model")
        features = feature_info(network.module, name=network.name, image_size=network.size)
        _require_features(distill, "teacher", features)
        shared = shared_classes(network, classes, num_classes=num_classes) if distill.logit_terms else None
        teachers.append(TeacherSource(network, features, shared, weights_fingerprint(network.module)))
    return teachers


def build_module(
    config: FinetuneConfig, vit: nn.Module, teachers: list[TeacherSource], peers: Sequence[Peer] = ()
) -> Supervised | Distilled | Mutual:
    """Build what the engine trains: the network, and the terms that are on, initialised from the seed, or its peers."""
    distill = config.distill
    if not distill.terms:
        return Supervised(vit)
    if distill.mutual.on:
        if not isinstance(vit, PlainViT):
            raise ConfigError("distill.mutual: the student is not a ViT of timm", "leave it out")
        is_scheduled, others = distill.mutual.is_scheduled, [peer.vit for peer in peers]
        return Mutual(vit, others, label_weight=distill.label_weight, is_scheduled=is_scheduled)
    student = feature_info(vit, name="the student", image_size=config.data.image_size)
    if isinstance(vit, VisionTransformer) and is_plain_vit(vit):
        student = replace(student, vit=vit, exits=config.student.exits)
    else:
        student = replace(student, channels=())  # its maps have no grid that a teacher's are resampled to
    _require_features(distill, "student", student)
    _require_exits(config, student)
    features = [teacher.features for teacher in teachers]
    terms = {name: TERMS[name](name, section, student, features) for name, section in distill.terms.items()}
    scheduled = [name for name, term in distill.terms.items() if term.is_scheduled]
    module = Distilled(
        vit,
        terms,
        requested=_requested(config, "student"),
        label_weight=distill.label_weight,
        scheduled=scheduled,
        predicts=distill.past.stores,
    )
    initialize(module.terms, seed=config.seed)
    return module


def build_teachers(
    config: FinetuneConfig,
    teachers: list[TeacherSource],
    *,
    grid: int,
    plan: Plan,
    mean: Triple,
    std: Triple,
    device: torch.device,
) -> list[OutputTeacher]:
    """Build the teachers on `device`.

    grid: side of the student's patch grid. mean, std: the student's normalisation. Raises ConfigError where a term
    relates the images of a micro-batch and there is only one.
    """
    distill = config.distill
    related = [name for name in BATCH_RELATION_TERMS if name in distill.terms]
    if related and plan.batch.micro_batch < 2:
        raise ConfigError(
            f"engine.micro_batch: distill.{related[0]} compares images of a micro-batch, and there is only 1",
            "use a larger optim.global_batch, or fewer ranks",
        )
    requested = _requested(config, "teacher")
    dtype = DTYPES[resolve_precision(distill.precision, device)]
    return [
        OutputTeacher(
            teacher.network,
            requested=requested,
            student_mean=mean,
            student_std=std,
            student_grid=grid,
            classes=teacher.classes,
            dtype=dtype,
        ).to(device)
        for teacher in teachers
    ]


def build_past(
    config: FinetuneConfig, vit: nn.Module, *, plan: Plan, samples: int, num_classes: int, device: torch.device
) -> Past | Predictions | None:
    """Build the network's past, or the store of its predictions; None without that term. samples: in the shards."""
    section, epochs = config.distill.past, config.optim.epochs
    if not section.on:
        return None
    if section.stores:
        return Predictions(section, plan=plan, epochs=epochs, samples=samples, num_classes=num_classes)
    precision = resolve_precision(config.engine.precision, device)
    return Past(section, vit, plan=plan, epochs=epochs, precision=precision).to(device)


def build_codistillation(
    config: FinetuneConfig,
    *,
    plan: Plan,
    classes: tuple[str, ...],
    num_classes: int,
    mean: Triple,
    std: Triple,
    device: torch.device,
) -> Codistillation | None:
    """Build the exchange with other runs; None without that term. classes: names of the student's, empty if unknown."""
    section = config.distill.codistillation
    if not section.on:
        return None
    return Codistillation(
        section=section,
        seed=config.seed,
        plan=plan,
        kept_steps=config.log.keep * plan.steps_in(config.log.save_every_epochs),
        classes=classes,
        num_classes=num_classes,
        mean=mean,
        std=std,
        dtype=DTYPES[resolve_precision(config.distill.precision, device)],
        device=device,
    )


def distillation_lines(config: FinetuneConfig, teachers: list[TeacherSource], *, micro_batch: int) -> list[str]:
    """Describe the teachers and terms, one per line; empty without a term."""
    distill = config.distill
    if not distill.terms:
        return []
    lines = [f"teacher  {teacher.describe()}" for teacher in teachers]
    lines.append(f"labels   weight {distill.label_weight:g}" + ("" if distill.reads_labels else ", none is read"))
    for name, term in distill.terms.items():
        section = term.model_dump(exclude=set(TermConfig.model_fields), exclude_none=True)
        settings = "".join(f", {key} {_plain(value)}" for key, value in section.items())
        related = f", within micro-batches of {micro_batch}" if name in BATCH_RELATION_TERMS else ""
        lines.append(f"term     {name} {term.describe_schedule()}{settings}{related}")
    return lines


def _requested(config: FinetuneConfig, side: str) -> RequestedOutputs:
    """Return the outputs that the terms need of the `student` or of a `teacher`."""
    distill, of_student = config.distill, side == "student"
    depths = _paired(distill, side)
    if of_student and distill.self_attention.on:
        depths["self_attention"] = distill.self_attention.blocks
    exits = config.student.exits if of_student else ()

    def of_terms(*names: str) -> tuple[int, ...]:
        return tuple(sorted({depth for name in names for depth in depths.get(name, ())}))

    return RequestedOutputs(
        logits=of_student or bool(distill.logit_terms),
        embedding=bool(exits) or any(name in distill.terms for name in BATCH_RELATION_TERMS),
        tokens=of_student and distill.hard_label.on and distill.hard_label.token,
        features=of_terms("hints", "attention_transfer", "self_attention"),
        blocks=exits,
        attention=of_terms("attention"),
        relations=of_terms("token_relations"),
    )


def _paired(distill: DistillConfig, side: str) -> dict[str, tuple[int, ...]]:
    """Return the depths of each term on pairs of depths, for one side."""
    return {name: getattr(term, side) for name, term in distill.terms.items() if isinstance(term, PairsConfig)}


def _open_teacher(distill: DistillConfig, source: str, *, weights: str) -> Network:
    """Open one teacher. Raises ConfigError if a term compares predictions and it has no classifier."""
    try:
        network = open_network(
            source,
            "outputs",
            image_size=distill.image_size,
            size_key="distill.image_size",
            section="distill",
            weights=weights,
        )
    except UserError as error:
        raise type(error)(f"distill.teachers: {error.cause}", error.remedy) from error
    if distill.logit_terms and not network.num_classes:
        raise ConfigError(
            f"distill.teachers: {source} has no classifier, and distill.{distill.logit_terms[0]} compares predictions",
            "fine-tune it first (maedistill finetune) and name that run, or leave out the terms on predictions",
        )
    return network


def _require_features(distill: DistillConfig, side: str, info: FeatureInfo) -> None:
    """Raise ConfigError if a network lacks what a term compares: pooled features, a depth, or a block's attention."""
    related = [term for term in BATCH_RELATION_TERMS if term in distill.terms]
    if related and not info.embedding:
        remedy = "use another teacher, or leave out this term"
        raise ConfigError(f"distill.{related[0]}: {info.name} gives no pooled features", remedy)
    for term, depths in _paired(distill, side).items():
        key = f"distill.{term}.{side}"
        if not info.channels:
            remedy = "use another teacher, or only terms on logits"
            raise ConfigError(f"{key}: {info.name} gives no features at several depths", remedy)
        if max(depths) >= len(info.channels):
            raise ConfigError(
                f"{key}: depth {max(depths)} does not exist, {info.name} has {len(info.channels)}",
                f"use 0 to {len(info.channels) - 1}",
            )
        if term in _VIT_ONLY and not all(info.num_heads[depth] if info.num_heads else 0 for depth in depths):
            raise ConfigError(
                f"{key}: {info.name} has no attention maps that can be seen",
                "use e.g. vit_small_patch16_224, or distill.attention_transfer, which takes activations of any network",
            )


def _require_exits(config: FinetuneConfig, student: FeatureInfo) -> None:
    """Raise ConfigError if the student cannot have the exits, which only its opened network may show."""
    exits = config.student.exits
    own = [name for name in ("exits", "self_attention") if name in config.distill.terms]
    if own and student.vit is None:
        raise ConfigError(f"distill.{own[0]}: the student is not a VisionTransformer of timm", "leave it out")
    if exits and max(exits) >= len(student.channels) - 1:
        raise ConfigError(
            f"student.exits: block {max(exits)} is not below the student's last one, {len(student.channels) - 1}",
            f"use blocks from 0 to {len(student.channels) - 2}",
        )


def _plain(value: object) -> str:
    """Format a setting for the lines at the start of a run: `[3, 5]`, `0.5`."""
    return str(list(value)) if isinstance(value, tuple) else f"{value:g}" if type(value) is float else str(value)
