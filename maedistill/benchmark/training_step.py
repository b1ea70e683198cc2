"""One optimizer step on synthetic images, in parts that can be timed: ours, the plain one, ours through the engine.

    draw -> teacher -> losses -> backward -> update

The learning rate is 0, so that all steps can share the same weights without changing them; an update costs the same.

    B images   N patches   s image side
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from maedistill.benchmark.noise import SyntheticBatch, zero_lr_optimizer
from maedistill.benchmark.plain_step import PlainTeacher, plain_method
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.images.transforms import to_float01
from maedistill.machine import DTYPES, precision
from maedistill.methods.mae import MAE, Target
from maedistill.methods.teacher import Teacher
from maedistill.models.decoder import TokenDecoder
from maedistill.models.encoder import MaskedEncoder
from maedistill.models.initialize import initialize
from maedistill.models.masking import PatchSplit
from maedistill.pretraining.build import build_encoder, build_method, build_teacher, build_teacher_source, mask_sizes
from maedistill.training.compilation import compile_function, compile_module
from maedistill.training.engine import Engine
from maedistill.training.optim import parameter_groups

PUBLISHED_DECODER = {"width": 512, "depth": 8, "num_heads": 16}  # of MAE ViT-B, L and H (He et al., 2022), and of DMAE
LARGE = 768  # the width of ViT-B
Mark = Callable[[str], None]


@dataclass(frozen=True)
class TrainingStep:
    """A step's functions. `draw` returns images [B, 3, s, s] in [0, 1] and their split; the rest is as in training."""

    draw: Callable[[], tuple[Tensor, PatchSplit]]
    teacher: Callable[[Tensor, PatchSplit], Target] | None
    losses: Callable[[Tensor, PatchSplit, Target | None], dict[str, Tensor]]
    backward: Callable[[Tensor], None]
    update: Callable[[], object]

    def __call__(self, mark: Mark = lambda part: None) -> None:
        """Run the step; call `mark` with the name of each part after it."""
        self.gradients(mark)
        self.update()
        mark("optimizer")

    def gradients(self, mark: Mark = lambda part: None) -> None:
        """Run the whole step except the update."""
        images, split = self.draw()
        mark("images and masks")
        target = self.teacher(images, split) if self.teacher is not None else None
        mark("teacher")
        loss = self.losses(images, split, target)["loss"]
        mark("student forward")
        self.backward(loss)
        mark("backward")


class StepComparison:
    """The networks of a config, ours and plain around the same weights, and their steps on the same images."""

    noise: SyntheticBatch

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        encoder = build_encoder(config)
        self.source = source = build_teacher_source(config, grid=encoder.grid)
        self.method: MAE = build_method(config, encoder, source).to(device)
        self.plain_method = plain_method(self.method)
        self.num_patches = encoder.grid**2
        self.precision = precision(config.engine.precision, device)
        # Published loops run in fp16 on a GPU, with a loss scale.
        self.plain_precision = "fp16" if device.type == "cuda" and self.precision != "fp32" else self.precision
        self.teacher: Teacher | None = None
        self.plain_teacher: PlainTeacher | None = None
        if source is not None:
            self.teacher = build_teacher(config, copy.deepcopy(source), device)
            exact = Teacher(source, taps=config.align.teacher, relations=config.method == "tinymim").to(device)
            if self.teacher.dtype == exact.dtype:
                self.teacher = exact
            self.plain_teacher = PlainTeacher(exact, _teacher_decoder(config, exact.encoder).to(device))

    def take(self, batch: int) -> None:
        """Draw `batch` synthetic images, which all steps use from now on."""
        self.noise = SyntheticBatch(self.config, batch, num_patches=self.num_patches, device=self.device)
        self._unit = to_float01(self.noise.images)

    def ours(self, *, compiled: bool = False) -> TrainingStep:
        """Return the training loop's step with a bare optimizer instead of the engine."""
        method, teacher = self.method, self.teacher
        if compiled:
            method, teacher = compile_function(method), compile_function(teacher) if teacher is not None else None
        losses, optimizer = self._autocast(method, self.precision), zero_lr_optimizer(self.method, self.config)
        return self._bare(self._draw, teacher, losses, optimizer, scaled=self.precision == "fp16")

    def engine(self, *, compiled: bool = False) -> TrainingStep:
        """Return the same step through DeepSpeed, as in training, on a copy of the weights."""
        method, teacher = copy.deepcopy(self.method), self.teacher
        if compiled:
            compile_module(method)
            teacher = compile_function(teacher) if teacher is not None else None
        settings = {"zero": self.config.engine.zero, "precision": self.precision, "clip": self.config.optim.clip}
        optimizer = zero_lr_optimizer(method, self.config)
        engine = Engine(method, optimizer, micro_batch=len(self.noise.images), accumulation=1, **settings)
        return TrainingStep(self._draw, teacher, engine, engine.backward, engine.step)

    def plain(self, method: MAE | None = None) -> TrainingStep:
        """Return the step of `plain_method` or `method`: torch chooses the AdamW loop; every step reads the loss."""
        method = method or self.plain_method
        groups = parameter_groups(method, self.config.optim.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=self.config.optim.betas)
        # As published, the teacher runs in the student's format, but in fp32 if ours does.
        number = self.plain_precision if self.teacher and self.teacher.dtype != torch.float32 else "fp32"
        teacher = self.plain_teacher and self._autocast(self.plain_teacher, number)
        losses = self._autocast(method, self.plain_precision)
        step = self._bare(self._plain_draw, teacher, losses, optimizer, scaled=self.plain_precision == "fp16")

        def backward(loss: Tensor) -> None:
            loss.item()  # waits for the device, as published loops do
            step.backward(loss)

        return replace(step, backward=backward)

    def published_method(self) -> MAE | None:
        """Build the plain method with the published decoder of MAE and DMAE, if the config's decoder differs.

        Returns None if it is the same, for AMD, whose decoders are light, and for teachers narrower than ViT-B or none.
        """
        config = self.config
        if config.method == "amd" or self.source is None or self.source.encoder.width < LARGE:
            return None
        if _size(config) == PUBLISHED_DECODER:
            return None
        changed = config.model_copy(update={"decoder": type(config.decoder)(**PUBLISHED_DECODER)})
        return plain_method(build_method(changed, build_encoder(changed), self.source).to(self.device))

    def _draw(self) -> tuple[Tensor, PatchSplit]:
        return self.noise.draw()  # look up `noise` at each call: `take` replaces it

    def _plain_draw(self) -> tuple[Tensor, PatchSplit]:
        """Return images already converted to float, as by the loader, and a patch order from sorting noise."""
        noise = torch.rand(len(self._unit), self.num_patches, device=self.device)
        return self._unit, PatchSplit(noise.argsort(dim=1), *mask_sizes(self.config, self.num_patches))

    def _autocast(self, module: nn.Module, number: str) -> Callable:
        """Return a function that calls `module` under autocast to the number format."""

        def call(*inputs: object) -> dict:
            with torch.autocast(self.device.type, dtype=DTYPES[number], enabled=number != "fp32"):
                return module(*inputs)

        return call

    def _bare(
        self,
        draw: Callable,
        teacher: Callable | None,
        losses: Callable,
        optimizer: torch.optim.AdamW,
        *,
        scaled: bool,
    ) -> TrainingStep:
        """Return a step without engine; `scaled`: with the loss scale of fp16."""
        scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)

        def update() -> None:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        return TrainingStep(draw, teacher, losses, lambda loss: scaler.scale(loss).backward(), update)


def _teacher_decoder(config: PretrainConfig, encoder: MaskedEncoder) -> TokenDecoder:
    """Build a random decoder of the teacher's published size, or of ours if the teacher is narrower than ViT-B."""
    size = PUBLISHED_DECODER if encoder.width >= LARGE else _size(config)
    shape = {"grid": encoder.grid, "patch_size": encoder.patch_size, "num_prefix": encoder.num_prefix}
    decoder = TokenDecoder(encoder.width, **size, **shape)
    initialize(decoder, seed=0)
    return decoder


def _size(config: PretrainConfig) -> dict[str, int]:
    """Return width, depth and heads of the student's decoder."""
    return config.decoder.model_dump(include=set(PUBLISHED_DECODER))
