"""A run of any stage from its start to its report: join the ranks, open the stage, build the engine, train.

run_stage: join -> RankWatch -> the stage (pretraining/setup.py, finetuning/setup.py) -> start_run -> Run -> train
"""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from timm.utils import ModelEmaV3
from torch import nn

from maedistill.config.plan import Plan
from maedistill.config.schema import RunConfig
from maedistill.escaping import say
from maedistill.machine import loader_workers, resolve_precision
from maedistill.processes import distributed
from maedistill.processes.diagnosis import peer_errors
from maedistill.processes.heartbeat import RankWatch
from maedistill.processes.preemption import PreemptionHandler
from maedistill.runs.async_saver import Saver
from maedistill.runs.callback import Callback
from maedistill.runs.folder import RunFolder
from maedistill.runs.history import has_losses
from maedistill.runs.resolve_auto import with_precision
from maedistill.runs.run import Run
from maedistill.training.compilation import should_compile
from maedistill.training.engine import Engine, initialize_distributed
from maedistill.training.optim import build_optimizer, build_schedule


class Stage(Protocol):
    """The parts of a run that a stage opens before its engine exists."""

    config: RunConfig
    plan: Plan
    module: nn.Module
    device: torch.device

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups for the optimizer."""

    @property
    def metadata(self) -> dict[str, Any]:
        """Return the metadata for run.json."""

    @property
    def summary_lines(self) -> list[str]:
        """Describe the run, one fact per line."""

    @property
    def extra_networks(self) -> Mapping[str, nn.Module]:
        """Return networks beside the trained one that checkpoints keep, by file name."""
        return {}

    def require_losses(self, returned: Any) -> None:
        """Raise ConfigError unless the module has returned losses. Ours always do."""
        return

    def compile(self) -> None:
        """Compile what a step runs."""


OpenStage = TypeVar("OpenStage", bound=Stage)


def run_stage(
    config: RunConfig,
    *,
    open_stage: Callable[..., OpenStage],
    train: Callable[[Run, OpenStage], None],
    write_report: Callable[[RunFolder], Path],
    callbacks: Sequence[Callback] = (),
    fresh: bool,
    extend: bool,
) -> None:
    """Run or continue a run to its end. Every rank calls it.

    fresh: delete the run in the folder and start over; a restart by a launcher or scheduler continues what was begun.
    extend: allow a changed number of epochs.
    Raises subclasses of UserError; RUN/exit.json records how the run ended.
    """
    folder = RunFolder(config.run)
    with folder.recorded_end():
        join(config)
        fresh = distributed.on_main(lambda: fresh and not folder.was_begun_by_this_job())
        lost = folder.record_error
        with folder.log.capture(), RankWatch(timeout_seconds=config.engine.timeout_seconds, on_loss=lost) as watch:
            config = with_precision(config, distributed.device(), fresh=fresh)
            stage = open_stage(config, world_size=distributed.world_size(), device=distributed.device(), fresh=fresh)
            with start_run(stage, folder, watch, fresh=fresh, extend=extend) as run:
                run.callbacks = tuple(callbacks)
                with run.resume():
                    train(run, stage)
            report = distributed.on_main(lambda: write_report(folder) if has_losses(folder.path) else None)
            if distributed.is_main():
                say(f"done: {report or f'{folder.path}, whose records hold no losses to report'}")
    with peer_errors():
        distributed.barrier()  # a launcher kills all ranks once one has exited: wait until all are done


def join(config: RunConfig) -> None:
    """Make this process a rank: process group, DeepSpeed, CPU threads. A second run of a program stays in its group."""
    if config.engine.deterministic:  # kernels that add in a fixed order; an operation without one raises
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # otherwise cuBLAS shares workspaces among streams
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow; it finds bugs
    initialize_distributed(config.engine.timeout_seconds)
    cores = distributed.cores()
    if config.threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(config.threads or cores)


def start_run(stage: Stage, folder: RunFolder, watch: RankWatch, *, fresh: bool, extend: bool) -> Run:
    """Open the run folder, print the summary and build the engine. fresh, extend: see `run_stage`. Collective."""
    config, plan, module, optim, device = stage.config, stage.plan, stage.module, stage.config.optim, stage.device
    precision = resolve_precision(config.engine.precision, device)
    execution = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "ranks": distributed.world_size(),
        "hosts": len(set(distributed.gather_objects(platform.node()))),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "compiled": should_compile(config.engine.compile, device, zero=config.engine.zero),
        "zero": config.engine.zero,
    }
    distributed.on_main(lambda: folder.open(config, stage.metadata, execution=execution, fresh=fresh, extend=extend))
    folder.is_ours = True
    if distributed.is_main():
        hardware = f"{execution['ranks']} x {execution['device']}, {execution['precision']}"
        compiled = "compiled (the first step may take minutes)" if execution["compiled"] else "not compiled"
        say(*stage.summary_lines, f"engine   {hardware}, {compiled}, ZeRO {execution['zero']}")
    else:
        folder.log.begin()  # for this rank's errors
    if execution["compiled"]:
        stage.compile()
    optimizer = build_optimizer(stage.groups, lr=optim.peak_lr, betas=optim.betas)
    schedule = build_schedule(optimizer, min_lr=optim.min_lr, warmup_steps=plan.warmup_steps, total_steps=plan.steps)
    ema = ModelEmaV3(module, decay=optim.ema, use_warmup=True) if optim.ema is not None else None
    engine = Engine(
        module,
        optimizer,
        zero=config.engine.zero,
        precision=precision,
        clip=optim.clip,
        micro_batch=plan.batch.micro_batch,
        accumulation=plan.batch.accumulation,
    )
    workers = loader_workers(config.data.workers, distributed.cores())
    saver = Saver(folder.checkpoints, keep=config.log.keep, texts=folder.texts)
    watch.before_leaving = saver.wait
    stop = PreemptionHandler(timeout_seconds=config.engine.timeout_seconds, leave=folder.leave_at_once)
    beside = ({"ema": ema.module} if ema is not None else {}) | dict(stage.extra_networks)
    return Run(config, folder, plan, module, engine, schedule, ema, device, workers, watch, saver, stop, beside)
