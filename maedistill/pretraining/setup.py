"""The parts of a pre-training run before its engine exists: data, student and teacher. Also the dry run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maedistill.config.plan import Plan, make_plan, plan_lines, world_size_from_environment
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.sources import EMA
from maedistill.data.shards.index import ShardIndex, why_unscorable
from maedistill.data.shards.patterns import describe_shards
from maedistill.escaping import warn
from maedistill.methods.average import COLLAPSED, AverageTeacher
from maedistill.methods.mae import MAE, BlockFeatures, Losses
from maedistill.methods.statistics import ChannelStatistics
from maedistill.methods.teacher import Teacher
from maedistill.models.maps import MapEncoder
from maedistill.models.masking import PatchSplit
from maedistill.models.vits import num_params_m
from maedistill.pretraining.build import (
    build_average,
    build_crops,
    build_encoder,
    build_method,
    build_teacher,
    build_teacher_source,
    mask_sizes,
    step_inputs,
)
from maedistill.pretraining.flops import count_flops
from maedistill.pretraining.micro_batch import fit_micro_batch, is_fitted
from maedistill.pretraining.more_teachers import MoreTeacher, open_more_teachers
from maedistill.processes import distributed
from maedistill.runs.dry_run import dry_run as plan_and_try
from maedistill.runs.dry_run import forward_backward
from maedistill.runs.objects import NOTHING, Objects, class_name, open_samples, trainable
from maedistill.runs.settle import settle, settle_precision
from maedistill.runs.start import Stage
from maedistill.training.compilation import compile_function, compile_module
from maedistill.training.optim import parameter_groups
from maedistill.weights.from_run import describe_network
from maedistill.weights.license import combined_license
from maedistill.weights.network import Network
from maedistill.weights.state_dict import weights_fingerprint


@dataclass(kw_only=True)
class Pretraining(Stage):
    """The parts, on `device`. teacher: None for a method without one; teacher_weights: the fingerprint of each.

    inputs: `step_inputs` of this run, from images uint8 [m, 3, s, s] and positions int64 [m] to images and masks.
    """

    config: PretrainConfig
    plan: Plan
    index: ShardIndex
    val_index: ShardIndex | None
    module: MAE
    source: Network | None
    teacher: Teacher | None
    teacher_weights: list[str]
    device: torch.device
    inputs: Callable[[Tensor, Tensor], tuple[Tensor, PatchSplit]]
    unscorable: str | None  # why there is neither kNN nor linear probe, although data.val is named
    auto_lines: list[str]
    has_objects: bool  # whether the student or the method is a caller's
    more: list[MoreTeacher]  # further teachers
    statistics: dict[int, ChannelStatistics]  # of teachers with align.normalize=stored
    fitted_to: int | None = None  # memory of the GPU, in bytes, that the micro-batch was fitted to
    has_warned: bool = False  # of collapsed targets

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups for the optimizer."""
        return parameter_groups(self.module, self.config.optim.weight_decay)

    @property
    def metadata(self) -> dict[str, Any]:
        """Return the metadata for run.json: network, samples, teacher, and the license of the weights used."""
        data, teachers = self.config.data, self._teacher_sources
        return {
            "stage": self.config.stage,
            "method": self.config.method,
            "method_class": class_name(type(self.module)),
            "network": describe_network(getattr(self.module.encoder, "vit", self.module.encoder)),
            "input": {
                "size": data.image_size,
                "mean": data.mean,
                "std": data.std,
                "crop": data.eval_crop,
                "exif": data.exif,
            },
            "data": {"images": len(self.index), "fingerprint": self.index.fingerprint()},
            "batch": {
                "ranks": self.plan.world_size,
                "micro_batch": self.plan.batch.micro_batch,
                "fitted_to_bytes": self.fitted_to,
            },
            "teacher": "; ".join(text for text, _ in teachers) or None,
            "teacher_weights": self.teacher_weights,
            "license": combined_license(source.license for _, source in teachers if source is not None),
        }

    @property
    def summary_lines(self) -> list[str]:
        """Describe the run, one fact per line."""
        config = self.config
        num_patches = self.module.encoder.grid**2
        student, teacher = mask_sizes(config, num_patches)
        views = f"student sees {student} of {num_patches} patches"
        if self.source is not None and isinstance(self.source.encoder, MapEncoder):
            views += f", teacher {self.source.encoder.view}"
        elif self.teacher is not None:
            views += f", teacher {teacher} (nested)" if teacher > student else ", teacher the same"
        sizes = ", ".join(f"{name} {num_params_m(child):.2f} M" for name, child in self.module.named_children())
        images = f"{self.plan.images:,} images in {len(self.index.shards)} shards at {config.data.image_size} px"
        shown, teachers = describe_shards(config.data.train, self.index.shards), self._teacher_sources
        return [
            f"method   {config.method}: {views}",
            *(line for text, source in teachers for line in (f"teacher  {text}", self._view(source)) if line),
            f"student  {config.student.title}  {sizes}",
            f"data     {images}, {shown}",
            *self._val_lines(),
            *self.auto_lines,
            *plan_lines(config, self.plan),
        ]

    @property
    def _teacher_sources(self) -> list[tuple[str, Network | None]]:
        """Describe the weights of each teacher, and name the network that they come from."""
        sources = [*filter(None, [self.source]), *(one.source for one in self.more)]
        described: list[tuple[str, Network | None]] = [(source.describe(), source) for source in sources]
        if isinstance(self.teacher, AverageTeacher):
            decay = "{:g} to {:g}".format(*self.teacher.decay)
            described.insert(0, (f"ema  the student's own moving average, decay {decay}", None))
        return described

    def _view(self, source: Network | None) -> str:
        """Describe the images of a teacher, and how its patches meet the student's, unless the method's line does."""
        if source is None or (source is self.source and isinstance(source.encoder, MapEncoder)):
            return ""
        size, own, encoder, student_grid = source.size, source.own_size, source.encoder, self.module.encoder.grid
        if isinstance(encoder, MapEncoder):
            return f"sees     {encoder.view}"
        trained = f" (its own: {own})" if own != size else ""
        meets = (
            "as the student"
            if encoder.grid == student_grid
            else f"the mean of {(encoder.grid // student_grid) ** 2} for one of the student's"
        )
        return f"sees     images of {size} px{trained}, {encoder.grid} x {encoder.grid} patches, {meets}"

    def _val_lines(self) -> list[str]:
        """Describe the validation images, if there are any, and say what they cannot be used for."""
        val, data = self.val_index, self.config.data
        if val is None or data.val is None:
            return []
        off = f"; no kNN, no probe: {self.unscorable}" if self.unscorable else ""
        return [f"val      {len(val):,} images, {describe_shards(data.val, val.shards)}{off}"]

    def module_inputs(self, pixels: Tensor, positions: Tensor) -> tuple[Any, ...]:
        """Return what the module computes a loss from: images, masks and the teachers' outputs."""
        images, split = self.inputs(pixels, positions)
        return images, split, *self.teach(images, split)[0]

    @property
    def teachers(self) -> list[Teacher]:
        """Return the teachers, the first one first."""
        return [self.teacher, *(one.teacher for one in self.more)] if self.teacher is not None else []

    @property
    def saved_beside(self) -> dict[str, nn.Module]:
        """Return the average and the measured statistics, which checkpoints keep, by file name."""
        kept = {"teacher": self.teacher.network} if isinstance(self.teacher, AverageTeacher) else {}
        return kept | {f"statistics{i + 1 if i else ''}": measured for i, measured in self.statistics.items()}

    def begin_step(self, step: int) -> None:
        """Set the factor on the terms of teachers in a step: the warm-up, and 0 until their channels are measured."""
        warmup = self.config.align.warmup_share * self.plan.steps
        self.module.ramp.fill_(min(1.0, step / warmup) if warmup else 1.0)
        for statistics in self.statistics.values():
            self.module.ramp.mul_(statistics.measured)

    def teach(self, images: Tensor, split: PatchSplit, step: int | None = None) -> tuple[list[BlockFeatures], Losses]:
        """Return the targets of each teacher, and further values to log.

        step: the step of a run; without one nothing is measured.
        """
        targets = [teacher(images, split) for teacher in self.teachers]
        notes = {"target_std": self.teacher.deviation(targets[0])} if isinstance(self.teacher, AverageTeacher) else {}
        for i, statistics in self.statistics.items():
            if step is not None:
                statistics.add(targets[i], step)
            targets[i] = statistics(targets[i])
        return targets, notes

    def end_step(self, step: int) -> None:
        """Update the teachers after a step: move the average, add up the statistics of all ranks. Collective."""
        if isinstance(self.teacher, AverageTeacher):
            self.teacher.follow(self.module.encoder, step)
        for statistics in self.statistics.values():
            statistics.end_step(step)

    def warn_of_collapse(self, means: Mapping[str, float]) -> None:
        """Warn once, on rank 0, if the logged targets are nearly the same for all patches of all images."""
        if means.get("target_std", 1.0) < COLLAPSED and not self.has_warned and distributed.is_main():
            self.has_warned = True
            warn(
                f"the targets deviate by {means['target_std']:.3f} only (target_std, below {COLLAPSED}): student and "
                "average have collapsed to one output; a lower learning rate, a higher teacher.decay or a longer "
                "align.warmup_share may help"
            )

    @property
    def is_random(self) -> bool:
        """Return whether the student's step may draw random numbers: drop path, or a module of the caller's."""
        return self.config.student.drop_path > 0 or self.has_objects

    def compile(self) -> None:
        """Compile what a step runs: images and masks, teacher, student."""
        self.inputs = compile_function(self.inputs)
        for network in (*self.teachers, self.module):
            compile_module(network)


def open_pretraining(
    config: PretrainConfig, *, world_size: int, device: torch.device, objects: Objects = NOTHING, fresh: bool = False
) -> Pretraining:
    """Open data and teacher, build the student, fit the micro-batch. Works without a process group too. Collective.

    objects: what a Python caller gives in place of what the config names. fresh: the run in the folder is about to be
    deleted.
    """
    index, val_index = distributed.main_first(lambda: open_samples(config.data, objects))
    config, auto_lines = settle(config, len(index), world_size=world_size, fresh=fresh)
    plan = make_plan(config, len(index), world_size=world_size)
    encoder = build_encoder(config, objects)
    source = distributed.main_first(lambda: build_teacher_source(config, grid=encoder.grid, objects=objects))
    teacher_weights = [weights_fingerprint(source.encoder)] if source is not None else []  # before their dtype changes
    more = distributed.main_first(lambda: open_more_teachers(config, encoder, device))
    teacher_weights += [one.fingerprint for one in more]
    method = trainable(build_method(config, encoder, source, objects, tuple(one.spec for one in more))).to(device)
    teacher = build_teacher(config, source, device) if source is not None else None
    if config.teacher.source == EMA:  # a copy of the student, which is the same on all ranks from the engine on
        distributed.broadcast_in_place([*method.state_dict().values()])
        teacher = build_average(config, method.encoder, device, steps=plan.steps)
    parts = Pretraining(
        config=config,
        plan=plan,
        index=index,
        val_index=val_index,
        module=method,
        source=source,
        teacher=teacher,
        teacher_weights=teacher_weights,
        device=device,
        inputs=partial(step_inputs, config, num_patches=encoder.grid**2),
        unscorable=why_unscorable(index, val_index) if val_index is not None else None,
        auto_lines=auto_lines,
        has_objects=objects.student is not None or objects.method is not None,
        more=more,
        statistics={},
    )
    aligns = [config.align, *(one.config.align for one in more)]
    for i, (one, align) in enumerate(zip(parts.teachers, aligns, strict=False)):  # mae has none
        if align.normalize == "stored":
            shape = {"width": one.width, "prefix": one.num_prefix, "steps": align.stored_steps}
            parts.statistics[i] = ChannelStatistics(align.teacher, **shape).to(device)
    if is_fitted(config, device):
        trial = partial(_trial_on_grey, parts)
        parts.plan, parts.fitted_to = fit_micro_batch(config, plan, parts.module, trial, device=device, fresh=fresh)
    return parts


def dry_run(config: PretrainConfig) -> None:
    """Open everything, count FLOPs, time a step and the loader, and print the plan.

    Writes nothing except an index for shards without one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = settle_precision(config, device, fresh=False)
    parts = open_pretraining(config, world_size=world_size_from_environment(), device=device)
    config = parts.config
    student_sees, teacher_sees = mask_sizes(config, parts.module.encoder.grid**2)
    flops = count_flops(parts.module, *parts.teachers, num_student=student_sees, num_teacher=teacher_sees)
    cost = "flops    " + ", ".join(f"{name} {value:.2f}" for name, value in flops.items()) + " GFLOP per image"
    crops = build_crops(config, parts.index)
    plan_and_try(parts, crops, lambda batch: parts.module_inputs(batch.images, batch.positions), more_lines=[cost])


def _trial_on_grey(parts: Pretraining, count: int) -> None:
    """Run a forward and backward pass on `count` grey images."""
    side = parts.config.data.image_size
    images = torch.full((count, 3, side, side), 127, dtype=torch.uint8, device=parts.device)
    positions = torch.arange(count, device=parts.device)
    forward_backward(parts, parts.module_inputs(images, positions))
