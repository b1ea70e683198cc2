"""Pre-training: the loop over optimizer steps, top to bottom.

    shards -> crops -> masks, teacher features -> method -> losses -> engine

Everything random is a function of (seed, position) or (seed, step), so a restart needs nothing but the step.

    m micro-batch   s image side
"""

import math
import time

import numpy as np
import torch

from maedistill.build import build_crops, split_of
from maedistill.config.schema import PretrainConfig
from maedistill.data.loader import CentreCrops, evaluation_batches, training_batches
from maedistill.data.transforms import random_flip, to_unit
from maedistill.errors import DataError, NumericsError
from maedistill.evaluate import knn_accuracy, pooled_features, spread_samples
from maedistill.pictures import reconstruction_sheet
from maedistill.randomness import Stream, key
from maedistill.report import write_run_report
from maedistill.run import Run, set_up
from maedistill.training import distributed
from maedistill.training.engine import initialize_distributed
from maedistill.training.metrics import Averages, MetricsFile, memory_gb, progress_line
from maedistill.training.run_folder import RunFolder

_PICTURES = 8  # images on a reconstruction sheet
_LEAST_SEEN = 10_000  # samples that data.max_bad_fraction is a share of at least, so that one bad image ends no run


def pretrain(config: PretrainConfig, *, fresh: bool = False, extend: bool = False) -> None:
    """Runs or continues a pre-training run to its end. Every rank calls it.

    fresh: refuse a folder that already holds a run. extend: allow a changed number of epochs.
    Raises kinds of UserError; RUN/exit.json says how it ended.
    """
    folder = RunFolder(config.run)
    with folder.recorded_end():
        initialize_distributed(config.engine.timeout_seconds)
        run = set_up(config, folder, fresh=fresh, extend=extend)
        train(run)
        report = distributed.on_main(lambda: write_run_report(folder))
        if distributed.is_main():
            print(f"done: {report}", flush=True)
    distributed.barrier()  # a launcher ends the others when one rank is gone: nobody leaves before all are done


def train(run: Run) -> None:
    """The loop. Collective."""
    config, plan, engine = run.config, run.plan, run.engine
    num_patches = run.method.encoder.grid**2
    run.restore()
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
    averages, bad = Averages(), []
    run.clock.restart()

    for step in range(run.step, plan.steps):
        run.schedule.step_update(step)
        for micro in range(plan.batch.accumulation):
            waiting = time.perf_counter()
            batch = next(batches)
            run.clock.wait(waiting)
            images = to_unit(batch.images)  # [m, 3, s, s]
            if config.data.flip:
                images = random_flip(images, batch.positions, seed=config.seed)
            split = split_of(config, batch.positions, num_patches)
            target = run.teacher(images, split) if run.teacher is not None else None
            if config.student.drop_path:
                torch.manual_seed(key(config.seed, Stream.NETWORK, step, micro, distributed.rank()))
            losses = engine(images, split, target)
            engine.backward(losses["loss"])
            engine.step()
            averages.add(losses)
            run.clock.images += len(images)
            bad += batch.bad
        run.step = step + 1
        if run.ema is not None:
            run.ema.update(run.method, step=run.step)

        # Log: the only place where the host waits for the device.
        if run.step % config.log.every == 0 or run.step == plan.steps:
            means = averages.read()
            require_finite(means, run.step)
            note_bad_samples(run, bad)
            values = means | measure(run)
            if metrics is not None:
                metrics.write(run.step, values)
                position = {"step": run.step, "total_steps": plan.steps, "epochs": config.optim.epochs}
                print(progress_line(means, values, **position), flush=True)

        # Draw, probe, save: each on its own period, none of it counted as training time. Saving comes last, so that
        # a checkpoint never stands for a picture or a probe that a kill took away.
        pause = time.perf_counter()
        if run.due(config.log.pictures_every_epochs):
            draw(run, metrics)
        if run.val_index is not None and run.due(config.log.knn_every_epochs):
            probe(run, metrics)
        if run.due(config.log.save_every_epochs):
            run.save()
        run.clock.pause(pause)
    if metrics is not None:
        metrics.close()


def draw(run: Run, metrics: MetricsFile | None) -> None:
    """Draws a few fixed images with fixed masks. Every rank computes (ZeRO 3 needs them all), rank 0 writes."""
    data, index = run.config.data, run.val_index or run.index
    crops = CentreCrops(index, spread_samples(index, _PICTURES), size=data.image_size, share=data.eval_crop)
    images = to_unit(next(evaluation_batches(crops, batch=_PICTURES, workers=0))[0].to(run.device))
    split = split_of(run.config, torch.arange(len(images), device=run.device), run.method.encoder.grid**2)
    sheet = reconstruction_sheet(run.method, images, split, teacher=run.teacher is not None)
    if metrics is not None:
        sheet.save(run.folder.pictures / f"step_{run.step:09d}.png")
        metrics.picture(run.step, "reconstruction", np.asarray(sheet))


def probe(run: Run, metrics: MetricsFile | None) -> None:
    """kNN accuracy of the validation images against training images. Collective."""
    data, most = run.config.data, run.config.log.knn_images
    batch, workers = run.plan.batch.micro_batch, run.workers
    bank, queries = (
        pooled_features(
            run.method, index, spread_samples(index, most),
            size=data.image_size, share=data.eval_crop, batch=batch, workers=workers,
        )
        for index in (run.index, run.val_index)
    )  # fmt: skip
    if metrics is not None:
        accuracy = knn_accuracy(*bank, *queries)
        metrics.write(run.step, {"knn": accuracy, "epoch": run.epoch})
        print(f"epoch {run.epoch:.1f}  kNN {accuracy:.1%} (a trend, no forecast)", flush=True)


def measure(run: Run) -> dict[str, float]:
    """What metrics.jsonl records beside the losses. Waits for the device."""
    norm = float(run.engine.grad_norm)
    rate, wait = run.clock.read()
    left = (run.plan.steps - run.step) * run.config.optim.global_batch / distributed.world_size()
    return {
        "epoch": run.epoch,
        "lr": run.engine.optimizer.param_groups[0]["lr"],
        "grad_norm": norm,
        "images_per_second": rate,
        "data_wait": wait,
        "memory_gb": memory_gb(run.device),
        "eta_seconds": left / rate,
        "trained_seconds": run.clock.trained,
    }


def require_finite(losses: dict[str, float], step: int) -> None:
    """Updates with a gradient that is not finite are skipped by the engine; a loss that is not finite ends the run."""
    broken = [name for name, value in losses.items() if not math.isfinite(value)]
    if broken:
        raise NumericsError(
            f"not finite by step {step}: {', '.join(broken)}",
            "start another run= with a lower optim.base_lr or optim.clip=1; the checkpoints of this one are sound",
        )


def note_bad_samples(run: Run, bad: list[str]) -> None:
    """Lists what could not be decoded, and ends the run when it is too much. Collective."""
    if bad:
        with run.folder.bad_samples.open("a") as file:
            file.writelines(f"{line}\n" for line in bad)
    share = distributed.all_reduce_mean({"bad": torch.tensor(float(len(bad)), device=run.device)})["bad"]
    run.bad += share * distributed.world_size()
    bad.clear()
    seen = max(_LEAST_SEEN, run.step * run.config.optim.global_batch)
    if run.bad > run.config.data.max_bad_fraction * seen:
        raise DataError(
            f"{run.bad:.0f} bad samples, more than data.max_bad_fraction={run.config.data.max_bad_fraction:g} allows",
            f"see {run.folder.bad_samples}; repair the shards or raise the limit",
        )
