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
from maedistill.models.maps import MapEncoder
from maedistill.models.masking import PatchSplit
from maedistill.models.vits import num_params_m
from maedistill.pretraining.build import build_crops, build_encoder, build_method, mask_sizes, step_inputs
from maedistill.pretraining.flops import count_flops
from maedistill.pretraining.given_method import require_losses
from maedistill.pretraining.micro_batch import fit_micro_batch, is_fitted
from maedistill.pretraining.teachers import RunTeacher, open_average, open_teachers
from maedistill.processes import distributed
from maedistill.runs.dry_run import dry_run as plan_and_try
from maedistill.runs.dry_run import forward_backward
from maedistill.runs.history import own_method
from maedistill.runs.objects import NOTHING, Objects, arguments_of, class_name, open_samples, trainable
from maedistill.runs.resolve_auto import resolve_auto, with_precision
from maedistill.runs.start import Stage
from maedistill.training.compilation import compile_function, compile_module
from maedistill.training.optim import parameter_groups
from maedistill.weights.from_run import describe_network
from maedistill.weights.license import combined_license

_UNTRAINED = (
    "warning  with method=tinymim and pixels.weight=0 nothing trains the projection and the MLP of the last block: "
    "use method=dmae, or pixels.weight=1"
)


@dataclass(kw_only=True)
class Pretraining(Stage):
    """The parts, on `device`. teachers: the first one first, none for a method without.

    inputs: `step_inputs` of this run, from images uint8 [m, 3, s, s] and positions int64 [m] to images and masks.
    """

    config: PretrainConfig
    plan: Plan
    index: ShardIndex
    val_index: ShardIndex | None
    module: MAE
    teachers: list[RunTeacher]
    device: torch.device
    inputs: Callable[[Tensor, Tensor], tuple[Tensor, PatchSplit]]
    unscorable: str | None  # why there is neither kNN nor linear probe, although data.val is named
    auto_lines: list[str]
    has_objects: bool  # whether the student or the method is a caller's
    method_arguments: dict[str, str]  # of a caller's method
    fitted_to: int | None = None  # memory of the GPU, in bytes, that the micro-batch was fitted to
    has_warned: bool = False  # of collapsed targets

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups for the optimizer."""
        return parameter_groups(self.module, self.config.optim.weight_decay)

    @property
    def metadata(self) -> dict[str, Any]:
        """Return the metadata for run.json: network, samples, teacher, and the license of the weights used."""
        data = self.config.data
        return {
            "stage": self.config.stage,
            "method": self.config.method,
            **self._made_by,
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
            "teacher": "; ".join(one.describe() for one in self.teachers) or None,
            "teacher_weights": [one.fingerprint for one in self.teachers if one.fingerprint is not None],
            "license": combined_license(one.network.license for one in self.teachers if one.network is not None),
        }

    @property
    def _made_by(self) -> dict[str, Any]:
        return {"method_class": class_name(type(self.module)), "method_arguments": self.method_arguments}

    @property
    def method_name(self) -> str:
        """Name the method: dmae, say, or a caller's class with its arguments."""
        return own_method(self._made_by) or self.config.method

    @property
    def summary_lines(self) -> list[str]:
        """Describe the run, one fact per line."""
        config = self.config
        num_patches = self.module.encoder.grid**2
        student, teacher = mask_sizes(config, num_patches)
        views = f"student sees {student} of {num_patches} patches"
        if self.teachers and isinstance(encoder := self.teachers[0].teacher.encoder, MapEncoder):
            views += f", teacher {encoder.view}"
        elif self.teachers:
            views += f", teacher {teacher} (nested)" if teacher > student else ", teacher the same"
        sizes = ", ".join(f"{name} {num_params_m(child):.2f} M" for name, child in self.module.named_children())
        images = f"{self.plan.images:,} images in {len(self.index.shards)} shards at {config.data.image_size} px"
        shown = describe_shards(config.data.train, self.index.shards)
        return [
            f"method   {self.method_name}: {views}",
            *(line for one in self.teachers for line in (f"teacher  {one.describe()}", self._view(one)) if line),
            f"student  {config.student.title}  {sizes}",
            f"data     {images}, {shown}",
            *self._val_lines(),
            *self.auto_lines,
            *plan_lines(config, self.plan),
            *([_UNTRAINED] if config.method == "tinymim" and not config.needs_decoder else []),
        ]

    def _view(self, one: RunTeacher) -> str:
        """Describe the images of a teacher, and how its patches meet the student's, unless the method's line does."""
        network, student_grid = one.network, self.module.encoder.grid
        if network is None:
            return ""
        size, own, encoder = network.size, network.own_size, network.encoder
        if isinstance(encoder, MapEncoder):
            return f"sees     {encoder.view}" if one is not self.teachers[0] else ""
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
    def extra_networks(self) -> dict[str, nn.Module]:
        """Return the average and the measured statistics, which checkpoints keep, by file name."""
        saved: dict[str, nn.Module] = {}
        for number, one in enumerate(self.teachers, 1):
            if isinstance(one.teacher, AverageTeacher):
                saved["teacher"] = one.teacher.network
            if one.statistics is not None:
                saved[f"statistics{number if number > 1 else ''}"] = one.statistics
        return saved

    def require_losses(self, returned: Any) -> None:
        """Raise ConfigError for a method that did not return losses."""
        require_losses(returned, class_name(type(self.module)))

    def begin_step(self, step: int) -> None:
        """Set the factor on the terms of teachers in a step: the warm-up, and 0 until their channels are measured."""
        warmup = self.config.align.warmup_share * self.plan.steps
        self.module.ramp.fill_(min(1.0, step / warmup) if warmup else 1.0)
        for one in self.teachers:
            if one.statistics is not None:
                self.module.ramp.mul_(one.statistics.measured)

    def teach(self, images: Tensor, split: PatchSplit, step: int | None = None) -> tuple[list[BlockFeatures], Losses]:
        """Return the targets of each teacher, and further values to log.

        step: the step of a run; without one nothing is measured.
        """
        targets, notes = [], {}
        for one in self.teachers:
            features = one.teacher(images, split)
            if isinstance(one.teacher, AverageTeacher):
                notes["target_std"] = one.teacher.deviation(features)
            if one.statistics is not None and step is not None:
                one.statistics.add(features, step)
            targets.append(features if one.statistics is None else one.statistics(features))
        return targets, notes

    def end_step(self, step: int) -> None:
        """Update the teachers after a step: move the average, add up the statistics of all ranks. Collective."""
        for one in self.teachers:
            if isinstance(one.teacher, AverageTeacher):
                one.teacher.follow(self.module.encoder, step)
            if one.statistics is not None:
                one.statistics.end_step(step)

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
        for network in (*(one.teacher for one in self.teachers), self.module):
            compile_module(network)


def open_pretraining(
    config: PretrainConfig, *, world_size: int, device: torch.device, objects: Objects = NOTHING, fresh: bool = False
) -> Pretraining:
    """Open data and teacher, build the student, fit the micro-batch. Works without a process group too. Collective.

    objects: what a Python caller gives in place of what the config names. fresh: the run in the folder is about to be
    deleted.
    """
    index, val_index = distributed.main_first(lambda: open_samples(config.data, objects))
    config, auto_lines = resolve_auto(config, len(index), world_size=world_size, fresh=fresh)
    plan = make_plan(config, len(index), world_size=world_size)
    encoder = build_encoder(config, objects)
    teachers = distributed.main_first(lambda: open_teachers(config, encoder, device, objects))
    network = next((one.network for one in teachers if one.config is config), None)  # of the first
    more = tuple(one.spec for one in teachers if one.config is not config)
    method = trainable(build_method(config, encoder, network, objects, more)).to(device)
    if config.teacher.source == EMA:  # a copy of the student, which is the same on all ranks from the engine on
        distributed.broadcast_in_place([*method.state_dict().values()])
        teachers.insert(0, open_average(config, method.encoder, device, steps=plan.steps))
    parts = Pretraining(
        config=config,
        plan=plan,
        index=index,
        val_index=val_index,
        module=method,
        teachers=teachers,
        device=device,
        inputs=partial(step_inputs, config, num_patches=encoder.grid**2),
        unscorable=why_unscorable(index, val_index) if val_index is not None else None,
        auto_lines=auto_lines,
        has_objects=objects.student is not None or objects.method is not None,
        method_arguments=arguments_of(objects.method),
    )
    if is_fitted(config, device):
        trial = partial(_trial_on_grey, parts)
        parts.plan, parts.fitted_to = fit_micro_batch(config, plan, parts.module, trial, device=device, fresh=fresh)
    return parts


def dry_run(config: PretrainConfig, *, extend: bool = False) -> None:
    """Open everything, count FLOPs, time a step and the loader, and print the plan.

    Writes nothing except an index for shards without one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = with_precision(config, device, fresh=False)
    parts = open_pretraining(config, world_size=world_size_from_environment(), device=device)
    config = parts.config
    student_sees, teacher_sees = mask_sizes(config, parts.module.encoder.grid**2)
    teachers = [one.teacher for one in parts.teachers]
    flops = count_flops(parts.module, *teachers, num_student=student_sees, num_teacher=teacher_sees)
    cost = "flops    " + ", ".join(f"{name} {value:.2f}" for name, value in flops.items()) + " GFLOP per image"
    crops = build_crops(config, parts.index)
    plan_and_try(
        parts, crops, lambda batch: parts.module_inputs(batch.images, batch.positions), extend=extend, more_lines=[cost]
    )


def _trial_on_grey(parts: Pretraining, count: int) -> None:
    """Run a forward and backward pass on `count` grey images."""
    side = parts.config.data.image_size
    images = torch.full((count, 3, side, side), 127, dtype=torch.uint8, device=parts.device)
    positions = torch.arange(count, device=parts.device)
    forward_backward(parts, parts.module_inputs(images, positions))
