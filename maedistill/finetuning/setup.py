"""The parts of a fine-tuning run before its engine exists: data, network and recipe. Also the dry run."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from maedistill.config.auto import with_values
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.plan import Plan, make_plan, plan_lines, world_size_from_environment
from maedistill.config.schema import Triple
from maedistill.data.images.augment import Mixing, seed_generators
from maedistill.data.images.transforms import normalize, random_flip, to_float01
from maedistill.data.loading.batch import Batch
from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform
from maedistill.data.loading.order import label_subset
from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.patterns import describe_shards
from maedistill.errors import ConfigError
from maedistill.finetuning.build import build_classifier, build_init_source, build_labelled_crops, build_mixing
from maedistill.finetuning.build_distillation import (
    build_codistillation,
    build_module,
    build_past,
    build_teachers,
    distillation_lines,
    open_teachers,
)
from maedistill.finetuning.codistillation import Codistillation
from maedistill.finetuning.labelled import count_classes, open_labelled
from maedistill.finetuning.objective import Distilled, Mutual, Supervised
from maedistill.finetuning.outputs import Outputs, is_plain_vit
from maedistill.finetuning.past import Past
from maedistill.finetuning.peers import Peer, open_peers
from maedistill.finetuning.predictions import Predictions
from maedistill.finetuning.teacher import OutputTeacher, TeacherSource
from maedistill.finetuning.term_weights import TermWeights
from maedistill.models.vits import PlainViT, num_params_m
from maedistill.processes import distributed
from maedistill.runs.dry_run import dry_run as plan_and_try
from maedistill.runs.objects import NOTHING, Objects, trainable
from maedistill.runs.resolve_auto import resolve_auto, with_precision
from maedistill.runs.start import Stage
from maedistill.training.compilation import compile_module
from maedistill.training.optim import layer_rates, network_groups, parameter_groups
from maedistill.weights.from_run import describe_network
from maedistill.weights.license import combined_license
from maedistill.weights.network import Network

_MORE_LABELS = (
    "warning  data.label_fraction: runs draw their labelled images by their seeds, so this run also learns from "
    "its peers' labels"
)


@dataclass(kw_only=True)
class Finetuning(Stage):
    """The parts, on `device`. init: None from scratch; samples: the ids of the label subset, int64 [n].

    teachers, frozen: of distillation, as they were opened and as they run. weights: of its terms, None without one.
    past: of the network itself, if a term needs it.
    """

    config: FinetuneConfig
    plan: Plan
    index: ShardIndex
    val_index: ShardIndex
    samples: Tensor
    num_classes: int
    module: Supervised | Distilled | Mutual
    init: Network | None
    mean: Triple
    std: Triple
    device: torch.device
    teachers: list[TeacherSource]
    frozen: list[OutputTeacher]
    weights: TermWeights | None
    auto_lines: list[str]
    peers: list[Peer]
    past: Past | Predictions | None
    codistillation: Codistillation | None

    @property
    def extra_networks(self) -> dict[str, nn.Module]:
        """Return networks beside the trained one that checkpoints keep, by file name."""
        return self.past.extra_networks if isinstance(self.past, Past) else {}

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups for the optimizer. Parameters of distillation terms get the head's rate."""
        optim = self.config.optim
        students = [self.module.vit, *(peer.vit for peer in self.peers)]
        groups = [
            group
            for student in students
            for group in network_groups(student, optim.weight_decay, layer_decay=optim.layer_decay)
        ]
        if isinstance(self.module, Distilled):
            own = parameter_groups(self.module.terms, optim.weight_decay)
            groups += [group | {"lr_scale": 1.0} for group in own if group["params"]]
        return groups

    @property
    def metadata(self) -> dict[str, Any]:
        """Return the metadata for run.json: network, input, samples, initial weights and their license."""
        data, init = self.config.data, self.init
        own_license = combined_license(
            [part.license for part in (init, *(peer.source for peer in self.peers)) if part is not None]
            + [teacher.network.license for teacher in self.teachers]
        )
        return {
            "stage": self.config.stage,
            "network": describe_network(self.module.vit),
            "input": {
                "size": data.image_size,
                "mean": self.mean,
                "std": self.std,
                "crop": data.eval_crop,
                "exif": data.exif,
            },
            "classes": list(self.index.classes or self.val_index.classes) or None,
            "data": {"images": len(self.samples), "fingerprint": self.index.fingerprint()},
            "validation": {"images": len(self.val_index), "fingerprint": self.val_index.fingerprint()},
            "init": init.describe() if init is not None else None,
            "origin": init.origin if init is not None else None,
            "exits": list(self.config.student.exits),
            "exits_own_block": self.config.distill.exits.own_block,
            "peers": [peer.metadata for peer in self.peers],
            "teacher": "; ".join(teacher.describe() for teacher in self.teachers) or None,
            "teacher_weights": [teacher.fingerprint for teacher in self.teachers],
            "license": own_license,
            "codistillation": self.codistillation.entry(own_license) if self.codistillation is not None else None,
        }

    @property
    def summary_lines(self) -> list[str]:
        """Describe the run, one fact per line."""
        config, vit, data = self.config, self.module.vit, self.config.data
        share = f" ({100 * data.label_fraction:g} % of each class)" if data.label_fraction < 1 else ""
        rates = layer_rates(self.groups, config.optim.peak_lr)
        if isinstance(vit, PlainViT):
            shape = f"{vit.embed_dim} x {len(vit.blocks)}, {num_params_m(vit):.2f} M, pooling {vit.global_pool}"
        else:
            shape = f"{type(vit).__name__}, {num_params_m(vit):.2f} M"
        return [
            f"start    {self.init.describe() if self.init is not None else 'from scratch'}",
            f"network  {shape}, {self.num_classes} classes, drop path {config.student.drop_path:g}",
            f"data     {self.plan.images:,} images{share} at {data.image_size} px{self._size_note()}, "
            f"{describe_shards(data.train, self.index.shards)}",
            f"eval     {len(self.val_index):,} images, {describe_shards(data.val or '', self.val_index.shards)}",
            *self.auto_lines,
            *(f"peer {number}   {peer.describe()}" for number, peer in enumerate(self.peers, 1)),
            *(self.codistillation.summary_lines(vit) if self.codistillation is not None else ()),
            *([_MORE_LABELS] if self.codistillation is not None and data.label_fraction < 1 else ()),
            *distillation_lines(config, self.teachers, micro_batch=self.plan.batch.micro_batch),
            *([self.past.describe()] if isinstance(self.past, Predictions) else []),
            *plan_lines(config, self.plan),
            f"layers   lr times {config.optim.layer_decay:g} a layer, head to patches: "
            + " ".join(f"{rate:.3g}" for rate in reversed(rates)),
        ]

    def _size_note(self) -> str:
        """Say how the image size relates to that of the initial weights; nothing from scratch."""
        if self.init is None:
            return ""
        own = self.init.own_size
        return " (as its start)" if own == self.config.data.image_size else f" (its start: {own} px, resampled)"

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Make the input of a step from a micro-batch on the device: images [m, 3, s, s], soft targets [m, C].

        Images are flipped by (seed, position), normalised, then erased and mixed with the global generators.
        """
        images = to_float01(batch.images)
        if self.config.data.flip:
            images = random_flip(images, batch.positions, seed=self.config.seed)
        labels = batch.labels.clamp(min=0)  # -1 if unlabelled, in which case nothing reads it
        return self._mixing(normalize(images, *self.channels), labels)

    @cached_property
    def _mixing(self) -> Mixing:
        return build_mixing(self.config, num_classes=self.num_classes, device=self.device)

    @cached_property
    def channels(self) -> tuple[Tensor, Tensor]:
        """Return mean and std on the device, [3, 1, 1] each. Cached, because creating them syncs with the GPU."""
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def compile(self) -> None:
        """Compile what a step runs: the student and plain ViT teachers; other teachers may break the graph."""
        compile_module(self.module)
        for teacher in self.frozen:
            if is_plain_vit(teacher.network):
                compile_module(teacher)
        if isinstance(self.past, Past) and is_plain_vit(self.past.network):
            compile_module(self.past)
        if self.codistillation is not None:
            self.codistillation.compiles = True

    def teacher_outputs(self, images: Tensor, step: int, batch: Batch | None = None) -> tuple[Any, ...]:
        """Return the module's inputs besides images [B, 3, s, s] and targets; empty without a term.

        batch: from which the images are made, for stored predictions.
        """
        if self.weights is None:
            return ()
        outputs = [teacher(images) for teacher in self.frozen] if self.weights.needs_teachers(step) else []
        extra: Outputs = {}
        if self.past is not None:
            extra |= self.past.outputs(images, step, batch=batch, now=self.module.vit)
        if self.codistillation is not None:
            extra |= self.codistillation.outputs(images, step)
        return (outputs, self.weights[step], *([extra] if extra else []))

    def validation(self) -> EvaluationImages:
        """Return every validation image, transformed as in timm's own evaluation."""
        data = self.config.data
        transform = evaluation_transform(size=data.image_size, crop=data.eval_crop)
        return EvaluationImages(self.val_index, torch.arange(len(self.val_index)), transform)


def open_finetuning(
    config: FinetuneConfig, *, world_size: int, device: torch.device, objects: Objects = NOTHING, fresh: bool = False
) -> Finetuning:
    """Open data and weights and build the network. Works without a process group too. Collective.

    objects: what a Python caller gives in place of what the config names. fresh: the run in the folder is about to be
    deleted.
    """
    if objects.student is not None:
        _require_no_vit(config)
    index, val_index = distributed.main_first(lambda: open_labelled(config, objects))
    samples = torch.arange(len(index))
    if config.distill.reads_labels:
        samples = label_subset(index.labels, config.data.label_fraction, seed=config.seed)
    config, auto_lines = resolve_auto(config, len(samples), world_size=world_size, fresh=fresh)
    plan = make_plan(config, len(samples), world_size=world_size)
    num_classes = count_classes(config, index, val_index)
    init = distributed.main_first(lambda: build_init_source(config, objects, num_classes=num_classes))
    size = init.size if init is not None else config.data.image_size or 224
    config = with_values(config, {"data.image_size": size})
    mean, std = config.data.mean, config.data.std
    if mean is None or std is None:
        mean, std = (init.mean, init.std) if init else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    classes = index.classes or val_index.classes
    teachers = distributed.main_first(
        lambda: open_teachers(config, objects.teachers, classes=classes, num_classes=num_classes)
    )
    vit = objects.student or build_classifier(config, init, num_classes=num_classes)
    peers: list[Peer] = []
    if config.distill.mutual.on:
        peers = distributed.main_first(lambda: open_peers(config, num_classes=num_classes, mean=mean, std=std))
    module = trainable(build_module(config, vit, teachers, peers)).to(device)
    grid = vit.patch_embed.grid_size[0] if isinstance(vit, PlainViT) else 1  # without terms on maps
    frozen = build_teachers(config, teachers, grid=grid, plan=plan, mean=mean, std=std, device=device)
    terms = tuple(config.distill.terms.values())
    past = build_past(config, vit, plan=plan, samples=len(index), num_classes=num_classes, device=device)
    codistillation = build_codistillation(
        config, plan=plan, classes=classes, num_classes=num_classes, mean=mean, std=std, device=device
    )
    return Finetuning(
        config=config,
        plan=plan,
        index=index,
        val_index=val_index,
        samples=samples,
        num_classes=num_classes,
        module=module,
        init=init,
        mean=mean,
        std=std,
        device=device,
        teachers=teachers,
        frozen=frozen,
        weights=TermWeights(terms, plan, device) if terms else None,
        auto_lines=auto_lines,
        peers=peers,
        past=past,
        codistillation=codistillation,
    )


def _require_no_vit(config: FinetuneConfig) -> None:
    """Raise ConfigError for what works with a ViT of timm only, while the student is a caller's module."""
    if config.engine.activation_checkpointing:
        cause = "engine.activation_checkpointing: the student is a module of your own"
        raise ConfigError(cause, "leave it out: your module has to do that itself")
    if config.distill.mutual.on:
        cause = "distill.mutual: its students are built from the config, and student= is a module of your own"
        raise ConfigError(cause, "leave out one of them")


def dry_run(config: FinetuneConfig, *, extend: bool = False) -> None:
    """Open everything, time a step and the loader, and print the plan.

    Writes nothing except an index for shards without one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = with_precision(config, device, fresh=False)
    parts = open_finetuning(config, world_size=world_size_from_environment(), device=device)
    config = parts.config
    heaviest_step = parts.weights.heaviest_step if parts.weights is not None else 0

    def module_inputs(batch: Batch) -> tuple[Any, ...]:
        seed_generators(config.seed)
        images, targets = parts.inputs(batch)
        return images, targets, *parts.teacher_outputs(images, heaviest_step, batch)

    peers, crops = parts.codistillation, build_labelled_crops(config, parts.index, parts.samples, mean=parts.mean)
    vit, size, run = parts.module.vit, config.data.image_size, Path(config.run)
    lines = peers.rehearse(vit, size=size, run=run) if peers is not None else []
    plan_and_try(parts, crops, module_inputs, extend=extend, more_lines=lines)
