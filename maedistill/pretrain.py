"""Pre-training: sets a run up, then loops over its steps, top to bottom.

    shards -> crops -> masks, teacher features -> method -> losses -> engine

Everything random is a function of (seed, position) or (seed, step), so a restart needs nothing but the step.

    m micro-batch   s image side
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from maedistill.build import (
    build_crops,
    build_encoder,
    build_index,
    build_method,
    build_teacher,
    build_teacher_source,
    cpu_share,
    precision,
    split_of,
)
from maedistill.config.schema import PretrainConfig
from maedistill.data.index import ShardIndex, open_index
from maedistill.data.loader import CentreCrops, evaluation_batches, training_batches
from maedistill.data.transforms import random_flip, to_unit
from maedistill.errors import DataError, NumericsError, UserError
from maedistill.evaluate import knn_accuracy, pooled_features, spread_samples
from maedistill.methods.mae import MAE
from maedistill.models.teacher import Teacher
from maedistill.pictures import reconstruction_sheet
from maedistill.plan import Plan, make_plan, plan_lines
from maedistill.randomness import Stream, key
from maedistill.report import write_run_report
from maedistill.training import distributed
from maedistill.training.checkpoint import load_latest, save_checkpoint
from maedistill.training.engine import Engine, initialize_distributed, shutdown_distributed
from maedistill.training.metrics import Averages, Clock, MetricsFile, memory_gb, progress_line
from maedistill.training.optim import build_optimizer, build_schedule, parameter_groups
from maedistill.training.run_folder import RunFolder

_PICTURES = 8  # images on a reconstruction sheet


@dataclass
class Run:
    """What the loop needs, made once by `set_up`."""

    config: PretrainConfig
    folder: RunFolder
    plan: Plan
    index: ShardIndex
    device: torch.device
    method: MAE
    teacher: Teacher | None
    engine: Engine
    schedule: CosineLRScheduler
    ema: ModelEmaV3 | None
    workers: int
    clock: Clock = field(default_factory=Clock)
    step: int = 0  # steps done
    bad: float = 0.0  # samples replaced since this start, over all ranks


def pretrain(config: PretrainConfig, *, fresh: bool = False, extend: bool = False) -> None:
    """Runs or continues a pre-training run to its end, on every rank.

    fresh: refuse a folder that already holds a run. extend: allow a changed number of epochs.
    Raises UserError kinds; RUN/exit.json says how it ended.
    """
    initialize_distributed(config.engine.timeout_seconds)
    run = set_up(config, fresh=fresh, extend=extend)
    with _recorded_end(run):
        train(run)
        if distributed.is_main():
            write_run_report(run.folder)
    shutdown_distributed()


def set_up(config: PretrainConfig, *, fresh: bool, extend: bool) -> Run:
    """Opens data, teacher and run folder, builds the student and its engine."""
    device = distributed.device()
    cores = cpu_share(distributed.local_world_size())
    if config.threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(config.threads or cores)
    index = build_index(config)
    plan = make_plan(config, index, world_size=distributed.world_size())
    encoder = build_encoder(config)
    source = build_teacher_source(config, grid=encoder.grid)
    method = build_method(config, encoder, source).to(device)
    folder = RunFolder(config.run)
    facts = {
        "data": {"images": len(index), "fingerprint": index.fingerprint()},
        "teacher": source.describe() if source is not None else None,
        "licence": source.licence if source is not None else "yours: no other weights were used",
    }
    distributed.on_main(lambda: folder.open(config, facts, fresh=fresh, extend=extend))
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
    return Run(config, folder, plan, index, device, method, teacher, engine, schedule, ema, workers)


def train(run: Run) -> None:
    """The loop over optimizer steps."""
    config, plan, engine = run.config, run.plan, run.engine
    num_patches = run.method.encoder.grid**2
    restore(run)
    metrics = None
    if distributed.is_main():
        metrics = MetricsFile(run.folder.path, first_step=run.step, tensorboard=config.log.tensorboard)
    batches = training_batches(
        build_crops(config, run.index),
        run.step,
        plan.steps,
        plan=plan.batch,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=run.workers,
        device=run.device,
    )
    averages, clock, bad = Averages(), run.clock, []
    clock.restart()

    for step in range(run.step, plan.steps):
        run.schedule.step_update(step)
        for micro in range(plan.batch.accumulation):
            waiting = time.perf_counter()
            batch = next(batches)
            clock.wait(waiting)
            images = to_unit(batch.images)  # [m, 3, s, s]
            if config.data.flip:
                images = random_flip(images, batch.positions, seed=config.seed)
            split = split_of(config, batch.positions, num_patches)
            target = run.teacher(images, split) if run.teacher is not None else None
            if config.student.drop_path:
                torch.manual_seed(int(key(config.seed, Stream.NETWORK, step, micro, distributed.rank())))
            losses = engine(images, split, target)
            engine.backward(losses["loss"])
            engine.step()
            averages.add(losses)
            clock.images += len(images)
            bad += batch.bad
        if run.ema is not None:
            run.ema.update(run.method, step=step)
        run.step = step + 1
        last = run.step == plan.steps

        # Log: the only place where the host waits for the device.
        if run.step % config.log.every == 0 or last:
            losses, values = averages.read(), measure(run)
            _require_finite(losses, run.step)
            _note_bad_samples(run, bad)
            if metrics is not None:
                metrics.write(run.step, losses | values)
                print(
                    progress_line(losses, values, step=run.step, total_steps=plan.steps, epochs=config.optim.epochs),
                    flush=True,
                )

        # Save, draw, probe: each on its own period, none of it counted as training time.
        pause = time.perf_counter()
        if last or _due(run, config.log.save_every_epochs):
            save(run)
        if config.log.pictures_every_epochs and (last or _due(run, config.log.pictures_every_epochs)):
            draw(run, metrics)
        if config.data.val and config.log.knn_every_epochs and (last or _due(run, config.log.knn_every_epochs)):
            values = probe(run)
            if metrics is not None:
                metrics.write(run.step, values)
                print(f"epoch {values['epoch']:.1f}  kNN {values['knn']:.1%} (a trend, no forecast)", flush=True)
        clock.pause(pause)
    if metrics is not None:
        metrics.close()


def restore(run: Run) -> None:
    """Goes on from the newest complete checkpoint, if there is one. Collective."""
    state = load_latest(run.folder.checkpoints, run.engine, ema=run.ema)
    if state is None:
        return
    run.step, run.clock.trained = state["step"], state["trained_seconds"]
    if distributed.is_main():
        print(f"continues at step {run.step} of {run.plan.steps} from {run.folder.checkpoints}", flush=True)


def save(run: Run) -> None:
    """Writes a checkpoint. Collective."""
    state = {"step": run.step, "epoch": run.plan.epoch_at(run.step), "trained_seconds": run.clock.trained}
    save_checkpoint(
        run.folder.checkpoints, step=run.step, engine=run.engine, ema=run.ema, state=state, keep=run.config.log.keep
    )


def draw(run: Run, metrics: MetricsFile | None) -> None:
    """Draws a few fixed images with fixed masks. Every rank computes, rank 0 writes."""
    data = run.config.data
    index = open_index(data.val) if data.val else run.index
    crops = CentreCrops(index, spread_samples(index, _PICTURES), size=data.image_size, share=data.eval_crop)
    images = to_unit(next(evaluation_batches(crops, batch=_PICTURES, workers=0))[0].to(run.device))
    split = split_of(run.config, torch.arange(len(images), device=run.device), run.method.encoder.grid**2)
    sheet = reconstruction_sheet(run.method, images, split, teacher=run.teacher is not None)
    if metrics is not None:
        sheet.save(run.folder.pictures / f"step_{run.step:09d}.png")
        metrics.picture(run.step, "reconstruction", np.asarray(sheet))


def probe(run: Run) -> dict[str, float]:
    """kNN accuracy of the validation images against training images, a share in [0, 1]. Collective."""
    data, most = run.config.data, run.config.log.knn_images
    settings = {"size": data.image_size, "share": data.eval_crop, "batch": run.plan.batch.micro_batch}
    features = [
        pooled_features(run.method, index, spread_samples(index, most), **settings)
        for index in (run.index, open_index(data.val))
    ]
    return {"knn": knn_accuracy(*features[0], *features[1]), "epoch": run.plan.epoch_at(run.step)}


def _due(run: Run, every_epochs: float) -> bool:
    """Whether the step just done crossed a multiple of `every_epochs`."""
    period = run.plan.steps_in(every_epochs)
    return math.floor(run.step / period) > math.floor((run.step - 1) / period)


def measure(run: Run) -> dict[str, float]:
    """What metrics.jsonl records beside the losses. Waits for the device."""
    norm = float(run.engine.grad_norm)
    rate, wait = run.clock.read()
    left = (run.plan.steps - run.step) * run.config.optim.global_batch / distributed.world_size()
    return {
        "epoch": run.plan.epoch_at(run.step),
        "lr": run.engine.optimizer.param_groups[0]["lr"],
        "grad_norm": norm,
        "images_per_second": rate,
        "data_wait": wait,
        "memory_gb": memory_gb(run.device),
        "eta_seconds": left / rate,
        "trained_seconds": run.clock.trained,
    }


def _require_finite(losses: dict[str, float], step: int) -> None:
    """Updates with a gradient that is not finite are skipped by the engine; a loss that is not finite ends the run."""
    broken = [name for name, value in losses.items() if not math.isfinite(value)]
    if broken:
        raise NumericsError(
            f"not finite by step {step}: {', '.join(broken)}",
            "lower optim.base_lr or set optim.clip=1; the last checkpoint is sound, the same command continues from it",
        )


def _note_bad_samples(run: Run, bad: list[str]) -> None:
    """Lists what could not be decoded, and stops the run when it is too much. Collective."""
    if bad:
        with run.folder.bad_samples.open("a") as file:
            file.writelines(line + "\n" for line in bad)
    count = distributed.all_reduce_mean({"bad": torch.tensor(float(len(bad)), device=run.device)})["bad"]
    run.bad += count * distributed.world_size()
    bad.clear()
    seen = max(run.plan.images, run.step * run.config.optim.global_batch)
    if run.bad > run.config.data.max_bad_fraction * seen:
        raise DataError(
            f"{run.bad:.0f} bad samples, more than data.max_bad_fraction={run.config.data.max_bad_fraction:g} allows",
            f"see {run.folder.bad_samples}; repair the shards or raise the limit",
        )


@contextmanager
def _recorded_end(run: Run) -> Iterator[None]:
    """Writes RUN/exit.json, whatever happens inside."""
    try:
        yield
    except UserError as error:
        _end(run, error.exit_code, error.cause)
        raise
    except BaseException as error:
        _end(run, 130 if isinstance(error, KeyboardInterrupt) else 1, f"{type(error).__name__}: {error}")
        raise
    _end(run, 0, "finished")


def _end(run: Run, exit_code: int, reason: str) -> None:
    if distributed.is_main():
        run.folder.ended(exit_code, reason, step=run.step)
