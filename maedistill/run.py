"""A run under way: the engine, its schedule and counters, restored and saved; the same for every stage.

What a stage adds (data, teacher, losses) is in its parts: `pretraining.py`, `finetuning.py`.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from maedistill.config.schema import RunConfig
from maedistill.errors import DataError, NumericsError
from maedistill.machine import cpu_share, precision
from maedistill.plan import Plan
from maedistill.training import distributed
from maedistill.training.checkpoint import load_latest, save_checkpoint
from maedistill.training.engine import Engine, initialize_distributed
from maedistill.training.metrics import Averages, Clock, MetricsFile, memory_gb, progress_line
from maedistill.training.optim import build_optimizer, build_schedule
from maedistill.training.run_folder import RunFolder

_LEAST_SEEN = 10_000  # samples that data.max_bad_fraction is a share of at least, so that one bad image ends no run


class Parts(Protocol):
    """What a stage opens before its engine exists."""

    config: RunConfig
    plan: Plan
    module: nn.Module
    device: torch.device

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer."""

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json keeps of the start."""

    @property
    def lines(self) -> list[str]:
        """The run in words."""


@dataclass
class Run:
    """The engine and how far it is, on this rank."""

    config: RunConfig
    folder: RunFolder
    plan: Plan
    module: nn.Module
    engine: Engine
    schedule: CosineLRScheduler
    ema: ModelEmaV3 | None
    device: torch.device
    workers: int
    clock: Clock = field(default_factory=Clock)
    step: int = 0  # steps done
    bad: float = 0.0  # samples replaced so far, over all ranks

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.plan.epoch_at(self.step)

    def due(self, every_epochs: float | None) -> bool:
        """Whether the step just done crossed a multiple of `every_epochs`, or was the last. None means never."""
        if every_epochs is None:
            return False
        period = self.plan.steps_in(every_epochs)
        return self.step == self.plan.steps or self.step // period > (self.step - 1) // period

    def restore(self) -> None:
        """Goes on from the newest complete checkpoint, if there is one. Collective."""
        state = load_latest(self.folder.checkpoints, self.engine, ema=self.ema)
        if state is None:
            return
        self.step, self.bad, self.clock.trained = state["step"], state["bad"], state["trained_seconds"]
        if distributed.is_main():
            print(f"continues at step {self.step} of {self.plan.steps} from {self.folder.checkpoints}", flush=True)

    def save(self) -> None:
        """Writes a checkpoint. Collective."""
        state = {"step": self.step, "bad": self.bad, "trained_seconds": self.clock.trained}
        folder, keep = self.folder.checkpoints, self.config.log.keep
        save_checkpoint(folder, step=self.step, engine=self.engine, ema=self.ema, state=state, keep=keep)

    def log(self, averages: Averages, bad: list[str], metrics: MetricsFile | None) -> None:
        """Writes and prints the losses since the last time; ends the run where they or the samples are bad."""
        means = averages.read()
        self.require_finite(means)
        self.note_bad_samples(bad)
        values = means | self.measure()
        if metrics is not None:
            metrics.write(self.step, values)
            position = {"step": self.step, "total_steps": self.plan.steps, "epochs": self.config.optim.epochs}
            print(progress_line(means, values, **position), flush=True)

    def measure(self) -> dict[str, float]:
        """What metrics.jsonl records beside the losses. Waits for the device."""
        norm = float(self.engine.grad_norm)
        rate, wait = self.clock.read()
        left = (self.plan.steps - self.step) * self.config.optim.global_batch / self.plan.world_size
        return {
            "epoch": self.epoch,
            "lr": max(group["lr"] for group in self.engine.optimizer.param_groups),
            "grad_norm": norm,
            "images_per_second": rate,
            "data_wait": wait,
            "memory_gb": memory_gb(self.device),
            "eta_seconds": left / rate,
            "trained_seconds": self.clock.trained,
        }

    def require_finite(self, losses: Mapping[str, float]) -> None:
        """The engine skips updates with a gradient that is not finite; a loss that is not finite ends the run."""
        broken = [name for name, value in losses.items() if not math.isfinite(value)]
        if broken:
            raise NumericsError(
                f"not finite by step {self.step}: {', '.join(broken)}",
                "start another run= with a lower optim.base_lr or optim.clip=1; the checkpoints of this one are sound",
            )

    def note_bad_samples(self, bad: list[str]) -> None:
        """Lists what could not be decoded, and ends the run when it is too much. Collective."""
        if bad:
            with self.folder.bad_samples.open("a") as file:
                file.writelines(f"{line}\n" for line in bad)
        share = distributed.all_reduce_mean({"bad": torch.tensor(float(len(bad)), device=self.device)})["bad"]
        self.bad += share * distributed.world_size()
        bad.clear()
        seen = max(_LEAST_SEEN, self.step * self.config.optim.global_batch)
        if self.bad > self.config.data.max_bad_fraction * seen:
            raise DataError(
                f"{self.bad:.0f} bad samples, more than data.max_bad_fraction={self.config.data.max_bad_fraction:g} "
                "allows",
                f"see {self.folder.bad_samples}; repair the shards or raise the limit",
            )


def join(config: RunConfig) -> None:
    """Makes this process a rank: process group, DeepSpeed, CPU threads. Once per process."""
    initialize_distributed(config.engine.timeout_seconds)
    if config.threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(config.threads or cpu_share(distributed.local_world_size()))


def start_run(parts: Parts, folder: RunFolder, *, fresh: bool, extend: bool) -> Run:
    """Opens the run folder, says what is going to happen, builds the engine. Collective.

    fresh: refuse a folder that already holds a run. extend: allow a changed number of epochs.
    """
    config, plan, module, optim = parts.config, parts.plan, parts.module, parts.config.optim
    distributed.on_main(lambda: folder.open(config, parts.facts, fresh=fresh, extend=extend))
    if distributed.is_main():
        print("\n".join(parts.lines), flush=True)
    if config.engine.compile:
        module.compile()
    optimizer = build_optimizer(parts.groups, lr=optim.peak_lr, betas=optim.betas)
    schedule = build_schedule(
        optimizer, peak=optim.peak_lr, min_lr=optim.min_lr, warmup_steps=plan.warmup_steps, total_steps=plan.steps
    )
    ema = ModelEmaV3(module, decay=optim.ema, use_warmup=True) if optim.ema is not None else None
    engine = Engine(
        module,
        optimizer,
        zero=config.engine.zero,
        precision=precision(config.engine.precision, parts.device),
        clip=optim.clip,
        micro_batch=plan.batch.micro_batch,
        accumulation=plan.batch.accumulation,
    )
    cores = cpu_share(distributed.local_world_size())
    workers = config.data.workers if config.data.workers is not None else min(8, cores)
    return Run(config, folder, plan, module, engine, schedule, ema, parts.device, workers)
