"""A run: everything that the loop over steps needs, made once from the config, restored and saved."""

import os
from dataclasses import dataclass, field

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from maedistill.build import (
    build_encoder,
    build_method,
    build_teacher,
    build_teacher_source,
    cpu_share,
    precision,
)
from maedistill.config.schema import PretrainConfig
from maedistill.data.index import ShardIndex
from maedistill.methods.mae import MAE
from maedistill.models.teacher import Teacher
from maedistill.plan import Plan, make_plan, open_data, plan_lines, run_facts
from maedistill.training import distributed
from maedistill.training.checkpoint import load_latest, save_checkpoint
from maedistill.training.engine import Engine
from maedistill.training.metrics import Clock
from maedistill.training.optim import build_optimizer, build_schedule, parameter_groups
from maedistill.training.run_folder import RunFolder


@dataclass
class Run:
    """The parts of a run on this rank, and how far it is."""

    config: PretrainConfig
    folder: RunFolder
    plan: Plan
    index: ShardIndex
    val_index: ShardIndex | None
    device: torch.device
    method: MAE
    teacher: Teacher | None
    engine: Engine
    schedule: CosineLRScheduler
    ema: ModelEmaV3 | None
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


def set_up(config: PretrainConfig, folder: RunFolder, *, fresh: bool, extend: bool) -> Run:
    """Opens data, teacher and run folder, builds student and engine. Collective; the process group is open."""
    device = distributed.device()
    cores = cpu_share(distributed.local_world_size())
    if config.threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(config.threads or cores)
    index, val_index = distributed.main_first(lambda: open_data(config))
    plan = make_plan(config, index, world_size=distributed.world_size())
    encoder = build_encoder(config)
    source = distributed.main_first(lambda: build_teacher_source(config, grid=encoder.grid))
    method = build_method(config, encoder, source).to(device)
    distributed.on_main(lambda: folder.open(config, run_facts(index, source), fresh=fresh, extend=extend))
    if distributed.is_main():
        print("\n".join(plan_lines(config, plan, index, method, source)), flush=True)
    teacher = build_teacher(config, source, device) if source is not None else None
    if config.teacher.compile and teacher is not None:
        teacher.compile()
    if config.engine.compile:
        method.compile()
    optim = config.optim
    optimizer = build_optimizer(parameter_groups(method, optim.weight_decay), lr=optim.peak_lr, betas=optim.betas)
    schedule = build_schedule(
        optimizer, peak=optim.peak_lr, min_lr=optim.min_lr, warmup_steps=plan.warmup_steps, total_steps=plan.steps
    )
    ema = ModelEmaV3(method, decay=optim.ema, use_warmup=True) if optim.ema is not None else None
    engine = Engine(
        method,
        optimizer,
        zero=config.engine.zero,
        precision=precision(config.engine.precision, device),
        clip=optim.clip,
        micro_batch=plan.batch.micro_batch,
        accumulation=plan.batch.accumulation,
    )
    workers = config.data.workers if config.data.workers is not None else min(8, cores)
    return Run(config, folder, plan, index, val_index, device, method, teacher, engine, schedule, ema, workers)
