"""The step of one rank as training makes it, through the engine and with its exchange of gradients, on noise.

    noise [B, 3, s, s] -> unit range, flip, masks -> teacher -> method -> engine.backward, engine.step

What a step costs depends neither on the images nor on the weights. One micro-batch per update: the least that a rank
can compute between two exchanges.

    B images   s image side
"""

import time

import torch
from torch import Tensor

from maedistill.benchmark.step import without_download
from maedistill.benchmark.training_step import TrainingStep
from maedistill.build_pretraining import (
    build_encoder,
    build_method,
    build_teacher,
    build_teacher_source,
    mask_sizes,
    split_of,
)
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.transforms import random_flip, to_unit
from maedistill.flops import count_flops
from maedistill.machine import precision
from maedistill.masking import PatchSplit
from maedistill.training import distributed
from maedistill.training.engine import Engine
from maedistill.training.optim import build_optimizer, parameter_groups


class EngineStep:
    """Student, teacher and engine of a config on this rank's device. Build it on every rank of an open process group.

    batch: images of this rank in a step, `engine.micro_batch` of them until `take` says otherwise.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config = without_download(config)
        self.device = distributed.device()
        encoder = build_encoder(config)
        source = build_teacher_source(config, grid=encoder.grid)
        self.method = build_method(config, encoder, source).to(self.device)
        self.teacher = build_teacher(config, source, self.device) if source is not None else None
        if config.engine.compile:
            self.method.compile()
        if config.teacher.compile and self.teacher is not None:
            self.teacher.compile()
        engine = Engine(
            self.method,
            # Rate 0 keeps the weights where they are, and costs the same.
            build_optimizer(parameter_groups(self.method, config.optim.weight_decay), lr=0.0, betas=config.optim.betas),
            zero=config.engine.zero,
            precision=precision(config.engine.precision, self.device),
            clip=config.optim.clip,
            micro_batch=config.engine.micro_batch,
            accumulation=1,
        )
        self.launch = TrainingStep(self._draw, self.teacher, engine, engine.backward, engine.step)
        self.take(config.engine.micro_batch)

    def __call__(self) -> int:
        """One step, to its end on the device. Returns how many images this rank took."""
        self.launch()
        self.wait()
        return self.batch

    def wait(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def take(self, batch: int) -> None:
        """From now on a step takes `batch` images."""
        side = self.config.data.image_size
        self.batch = batch
        self._noise = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=self.device)
        self._positions = torch.arange(batch, device=self.device) + distributed.rank() * batch

    def take_what_fits(self, seconds: float) -> None:
        """Takes the most images, 4, 8, 16, ..., up to `engine.micro_batch`, whose step is made in `seconds`.

        So that a CPU can be measured with the config of a GPU. For one rank alone.
        """
        most = self.config.engine.micro_batch
        self.take(min(4, most))
        self()  # the first step of all is slower
        while 2 * self.seconds() < seconds and self.batch < most:
            self.take(min(2 * self.batch, most))

    def seconds(self) -> float:
        """Of one step, after one that warms up."""
        self()
        start = time.perf_counter()
        self()
        return time.perf_counter() - start

    @property
    def parameters(self) -> int:
        """Numbers that are trained, and so gradients that ranks exchange."""
        return sum(parameter.numel() for parameter in self.method.parameters())

    @property
    def gflop(self) -> float:
        """Billions of floating-point operations per image, counted."""
        student, teacher = mask_sizes(self.config, self.method.encoder.grid**2)
        return count_flops(self.method, self.teacher, num_student=student, num_teacher=teacher)["total"]

    def _draw(self) -> tuple[Tensor, PatchSplit]:
        """Images [B, 3, s, s] in [0, 1] and their split, as the training loop makes them of what the loader brings."""
        images = to_unit(self._noise)
        if self.config.data.flip:
            images = random_flip(images, self._positions, seed=self.config.seed)
        return images, split_of(self.config, self._positions, self.method.encoder.grid**2)
