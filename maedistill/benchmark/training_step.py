"""One optimizer step on synthetic images, in parts that can be timed: through the engine as in training, or bare.

    images and masks -> teacher -> losses -> backward -> update

The cost of a step depends neither on the images nor on the weights. So images are noise, weights that would be
downloaded are random, and the learning rate is 0: all steps share their weights, and an update costs the same.

    B images   s image side
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from maedistill.config.pretrain import PretrainConfig
from maedistill.config.sources import EMA
from maedistill.errors import ConfigError
from maedistill.evaluation.latency import seconds_of
from maedistill.machine import Precision, autocast, resolve_precision
from maedistill.methods.mae import MAE, BlockFeatures
from maedistill.models.masking import PatchSplit
from maedistill.pretraining import build
from maedistill.pretraining.flops import count_flops
from maedistill.processes import distributed
from maedistill.training.compilation import compile_function, compile_module, should_compile
from maedistill.training.engine import Engine
from maedistill.training.optim import build_optimizer, parameter_groups

_STEP_SECONDS = 1.0  # longest time of a step whose batch is chosen here
Draw = Callable[[], tuple[Tensor, PatchSplit]]
TeacherCall = Callable[[Tensor, PatchSplit], BlockFeatures]
LossesCall = Callable[..., dict[str, Tensor]]  # of images, split and the teacher's features


@dataclass(frozen=True)
class TrainingStep:
    """A step's functions. `draw` returns images [B, 3, s, s] in [0, 1] and their split; the rest is as in training."""

    draw: Draw
    teacher: TeacherCall | None
    losses: LossesCall
    backward: Callable[[Tensor], object]
    update: Callable[[], object]

    def __call__(self) -> None:
        """Run the step."""
        deque(self.parts(), maxlen=0)

    def parts(self) -> Iterator[str]:
        """Run the step, and yield the name of each part after it."""
        yield from self.gradients()
        self.update()
        yield "optimizer"

    def gradients(self) -> Iterator[str]:
        """Run the parts before the update, and yield the name of each part after it."""
        images, split = self.draw()
        yield "images and masks"
        target = self.teacher(images, split) if self.teacher is not None else None
        yield "teacher"
        loss = self.losses(images, split, target)["loss"]
        yield "student forward"
        self.backward(loss)
        yield "backward"


class SyntheticTraining:
    """The networks of a config on this rank's device, and its training step on one batch of noise.

    batch: images per step on this rank. num_parameters: trained numbers, as many as gradients that ranks exchange.
    """

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.config = config = without_download(config)
        if config.more_teachers:
            cause, remedy = "a step is measured with one teacher", "leave it out; --dry-run times a step with all"
            raise ConfigError(f"more_teachers: {cause}", remedy)
        self.device, self.precision = device, resolve_precision(config.engine.precision, device)
        encoder = build.build_encoder(config)
        self.num_patches = encoder.grid**2
        self.source = build.build_teacher_source(config, grid=encoder.grid)
        self.method: MAE = build.build_method(config, encoder, self.source).to(device)
        self.teacher = build.build_teacher(config, self.source, device) if self.source is not None else None
        if config.teacher.source == EMA:
            self.teacher = build.build_average(config, self.method.encoder, device, steps=1)
        self.num_parameters = sum(parameter.numel() for parameter in self.method.parameters())
        self.set_batch_size(config.engine.micro_batch_limit)

    def count_gflop(self, method: MAE, teacher: nn.Module | None) -> dict[str, float]:
        """Count GFLOP per image of these networks or of their plain versions, by part and in `total`."""
        student_sees, teacher_sees = build.mask_sizes(self.config, self.num_patches)
        return count_flops(method, *filter(None, [teacher]), num_student=student_sees, num_teacher=teacher_sees)

    def set_batch_size(self, batch: int) -> None:
        """Draw `batch` images, which all steps use from now on. Ranks differ in positions, as in training."""
        side, first = self.config.data.image_size, distributed.rank() * batch
        self.batch = batch
        self.images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=self.device)
        self.positions = torch.arange(first, first + batch, device=self.device)

    def autotune_batch(self, step: TrainingStep) -> None:
        """Choose the largest batch of 1, 2, 4, ..., up to `engine.micro_batch`, whose step takes at most a second.

        This allows a CPU to be measured with the config of a GPU. Only for a single rank.
        """
        for batch in doubled(self.config.engine.micro_batch_limit):
            self.set_batch_size(batch)
            step()  # the first step of a shape is slower
            if 2 * seconds_of(step, self.device) > _STEP_SECONDS:
                return

    def engine_step(self, *, compiled: bool | None = None) -> TrainingStep:
        """Return the step of the training loop, through DeepSpeed, on a copy of the weights; `losses` is the engine.

        compiled: images and masks, teacher and student, as in a run with engine.compile=true; None: as the config says.
        """
        method, settings = copy.deepcopy(self.method), self.config.engine
        if compiled is None:
            compiled = should_compile(settings.compile, self.device, zero=settings.zero)
        if compiled:
            compile_module(method)
        engine = Engine(
            method,
            self.zero_lr_optimizer(method),
            zero=settings.zero,
            precision=self.precision,
            clip=self.config.optim.clip,
            micro_batch=self.batch,
            accumulation=1,
        )
        return TrainingStep(*self.inputs(compiled=compiled), engine, engine.backward, engine.step)

    def bare_step(self, *, compiled: bool = False) -> TrainingStep:
        """Return the same step in a loop of plain torch, without the engine."""
        losses = compile_function(self.method) if compiled else self.method
        optimizer = self.zero_lr_optimizer(self.method)
        return self.torch_step(*self.inputs(compiled=compiled), losses, optimizer, number=self.precision)

    def torch_step(
        self, draw: Draw, teacher: TeacherCall | None, losses: LossesCall, optimizer: AdamW, *, number: Precision
    ) -> TrainingStep:
        """Return a step of plain torch: autocast to the number format, in fp16 with a loss scale."""
        scaler = torch.amp.GradScaler(self.device.type, enabled=number == "fp16")

        def update() -> None:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        losses = autocast(self.device, number)(losses)
        return TrainingStep(draw, teacher, losses, lambda loss: scaler.scale(loss).backward(), update)

    def zero_lr_optimizer(self, method: nn.Module) -> AdamW:
        """Build the config's optimizer with learning rate 0: it costs the same and leaves the weights unchanged."""
        optim = self.config.optim
        return build_optimizer(parameter_groups(method, optim.weight_decay), lr=0.0, betas=optim.betas)

    def inputs(self, *, compiled: bool) -> tuple[Draw, TeacherCall | None]:
        """Return the functions that come before the student: images and masks, and the teacher."""
        inputs: Callable[..., tuple[Tensor, PatchSplit]] = partial(
            build.step_inputs, self.config, num_patches=self.num_patches
        )
        teacher: TeacherCall | None = self.teacher
        if compiled:
            inputs, teacher = compile_function(inputs), teacher and compile_function(teacher)
        return lambda: inputs(self.images, self.positions), teacher


def doubled(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to and with `most`."""
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def without_download(config: PretrainConfig) -> PretrainConfig:
    """Return the config with random teacher weights of the same shape, if the real ones are a download or a file."""
    kind, _, name = (config.teacher.source or "").partition(":")
    model = {"timm": name, "file": config.teacher.model}.get(kind)
    if model is None:
        return config
    changed = {"source": f"random:{model}", "model": None, "weights": None, "sha256": None}
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=changed)})
