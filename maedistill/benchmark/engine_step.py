"""One rank's training step on noise images, through the engine and with its exchange of gradients, as in training.

    noise [B, 3, s, s] -> unit range, flip, masks -> teacher -> method -> engine.backward, engine.step

The cost of a step depends neither on the images nor on the weights. Each update has one micro-batch, which is the least
that a rank can compute between two exchanges.

    B images   s image side
"""

import time

import torch

from maedistill.benchmark.noise import SyntheticBatch, zero_lr_optimizer
from maedistill.benchmark.step import without_download
from maedistill.benchmark.training_step import TrainingStep
from maedistill.config.pretrain import PretrainConfig
from maedistill.machine import precision
from maedistill.pretraining.build import build_encoder, build_method, build_teacher, build_teacher_source, mask_sizes
from maedistill.pretraining.flops import count_flops
from maedistill.processes import distributed
from maedistill.training.compilation import compile_module, should_compile
from maedistill.training.engine import Engine


class EngineStep:
    """Student, teacher and engine of a config on this rank's device. Build it on every rank of an open process group.

    batch: images per step on this rank, `engine.micro_batch` until `take` changes it. parameters: number of trained
    parameters, which is also the number of gradients that ranks exchange. gflop: billions of floating-point operations
    per image.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config = without_download(config)
        self.device = distributed.device()
        encoder = build_encoder(config)
        source = build_teacher_source(config, grid=encoder.grid)
        self.method = build_method(config, encoder, source).to(self.device)
        self.teacher = build_teacher(config, source, self.device) if source is not None else None
        # Count before the engine is built: ZeRO 3 leaves empty weights on each rank, and hooks that a copy cannot run.
        self.parameters = sum(parameter.numel() for parameter in self.method.parameters())
        student, teacher = mask_sizes(config, encoder.grid**2)
        self.gflop = count_flops(self.method, self.teacher, num_student=student, num_teacher=teacher)["total"]
        self.is_compiled = should_compile(config.engine.compile, self.device, zero=config.engine.zero)
        if self.is_compiled:
            for network in filter(None, (self.method, self.teacher)):
                compile_module(network)
        engine = Engine(
            self.method,
            zero_lr_optimizer(self.method, config),
            zero=config.engine.zero,
            precision=precision(config.engine.precision, self.device),
            clip=config.optim.clip,
            micro_batch=config.engine.micro_batch_limit,
            accumulation=1,
        )
        self.launch = TrainingStep(lambda: self._noise.draw(), self.teacher, engine, engine.backward, engine.step)
        self.take(config.engine.micro_batch_limit)

    def __call__(self) -> int:
        """Run one step until the device has finished it. Return the number of images on this rank."""
        self.launch()
        self.wait()
        return self.batch

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def take(self, batch: int) -> None:
        """Set the number of images per step to `batch`."""
        first, num_patches = distributed.rank() * batch, self.method.encoder.grid**2
        self.batch = batch
        self._noise = SyntheticBatch(
            self.config, batch, num_patches=num_patches, device=self.device, first=first, compiled=self.is_compiled
        )

    def autotune_batch(self, seconds: float) -> None:
        """Choose the largest batch of 4, 8, 16, ..., up to `engine.micro_batch`, whose step takes at most `seconds`.

        This allows a CPU to be measured with the config of a GPU. Only for a single rank.
        """
        most = self.config.engine.micro_batch_limit
        self.take(min(4, most))
        self()  # the first step of all is slower
        while 2 * self.seconds() < seconds and self.batch < most:
            self.take(min(2 * self.batch, most))

    def seconds(self) -> float:
        """Return the time of one step, measured after a warm-up step."""
        self()
        start = time.perf_counter()
        self()
        return time.perf_counter() - start
