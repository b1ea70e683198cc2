"""Pre-training: the loop over optimizer steps, top to bottom.

    shards -> crops -> masks, teacher features -> method -> losses -> engine

Everything random is a function of (seed, position) or (seed, step), so a restart needs only the step.

    m micro-batch   s image side
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maedistill.config.pretrain import PretrainConfig
from maedistill.data.images.transforms import to_float01
from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform, exact_batches
from maedistill.data.shards.index import ShardIndex
from maedistill.escaping import say, warn
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.features import pooled_features, random_subset
from maedistill.evaluation.knn import knn_accuracy
from maedistill.evaluation.linear_probe import probe_accuracy
from maedistill.pretraining.build import build_crops, split_of
from maedistill.pretraining.pictures import reconstruction_sheet
from maedistill.pretraining.setup import Pretraining, open_pretraining
from maedistill.processes import distributed
from maedistill.randomness import Stream, key
from maedistill.report.interactive import require_bokeh
from maedistill.report.run_page import refresh_run
from maedistill.report.run_report import write_run_report
from maedistill.runs.callback import Callback
from maedistill.runs.objects import NOTHING, Objects
from maedistill.runs.records import ignore_write_errors
from maedistill.runs.run import Run
from maedistill.runs.start import run_stage

_PICTURES, _SPARE = 8, 8  # images on a reconstruction sheet; others that take the place of undecodable ones


def pretrain(
    config: PretrainConfig,
    *,
    objects: Objects = NOTHING,
    callbacks: Sequence[Callback] = (),
    fresh: bool = False,
    extend: bool = False,
) -> None:
    """Run or continue a pre-training run to its end. Every rank calls it.

    objects: what a Python caller gives in place of what the config names.
    fresh: delete the run in the folder and start over. extend: allow a changed number of epochs.
    Raises subclasses of UserError; RUN/exit.json records how the run ended.
    """
    if config.log.report:
        require_bokeh()
    try:
        run_stage(
            config,
            open_stage=partial(open_pretraining, objects=objects),
            train=train,
            write_report=write_run_report,
            callbacks=callbacks,
            fresh=fresh,
            extend=extend,
        )
    finally:
        refresh_run(config.run, create=config.log.report)  # exit.json says by now how it ended


def train(run: Run, parts: Pretraining) -> None:
    """Run the training loop to the end of the run. Collective."""
    config, plan, engine = parts.config, parts.plan, run.engine
    crops = build_crops(config, parts.index)
    batches = run.batches(crops)
    redo_interrupted(run, parts)

    for step in range(run.step, plan.steps):
        run.schedule.step_update(step)
        parts.begin_step(step)
        for micro in range(plan.batch.accumulation):
            batch = run.next(batches)
            images, split = parts.inputs(batch.images, batch.positions)  # [m, 3, s, s]
            targets, notes = parts.teach(images, split, step)
            if parts.is_random:
                torch.manual_seed(key(config.seed, Stream.NETWORK, step, micro, distributed.rank()))
            losses = engine(images, split, *targets)
            parts.require_losses(losses)
            engine.backward(losses["loss"])
            engine.step()
            run.count(batch, losses | notes)
        parts.end_step(step)
        run.end_step()

        # Log: the only place where the host waits for the device.
        if run.should_log:
            parts.warn_of_collapse(run.log())

        # Save, draw, probe: each on its own period, none counted as training time. Saving comes first, so that a
        # picture or probe that fails costs no training.
        with run.untimed():
            if run.should_save:
                run.save()
            if run.due(config.log.pictures_every_epochs):
                draw(run, parts)
            if parts.val_index is not None and parts.unscorable is None:
                probe(run, parts, parts.val_index)
            log = config.log
            if any(map(run.due, (log.pictures_every_epochs, log.knn_every_epochs, log.probe_every_epochs))):
                refresh_run(config.run, create=log.report)
        run.raise_if_preempted()


def redo_interrupted(run: Run, parts: Pretraining) -> None:
    """Draw and probe what was due after the step of the checkpoint, but was cut short. Collective."""
    log, picture = parts.config.log, picture_path(run)
    with run.untimed():
        if run.step and run.due(log.pictures_every_epochs) and distributed.on_main(lambda: not picture.exists()):
            draw(run, parts)
        probed = "knn" if run.step and run.due(log.knn_every_epochs) else "linear"
        if parts.val_index is not None and parts.unscorable is None and run.is_missing(probed):
            probe(run, parts, parts.val_index)


def picture_path(run: Run) -> Path:
    """Return the file of the reconstruction sheet after the step just done."""
    return run.folder.pictures / f"step_{run.step:09d}.png"


def draw(run: Run, parts: Pretraining) -> None:
    """Draw a few fixed images with fixed masks. Every rank computes (ZeRO 3 needs all of them), rank 0 writes.

    Draws nothing where no pixels are predicted.
    """
    if parts.module.decoder is None or not parts.module.pixels.weight:
        return
    data, index = parts.config.data, parts.val_index or parts.index
    transform = evaluation_transform(size=data.image_size, crop=data.eval_crop)
    crops = EvaluationImages(index, random_subset(index, _PICTURES + _SPARE), transform)
    pixels, _, ids = next(exact_batches(crops, batch=_PICTURES + _SPARE, workers=0))
    images = to_float01(pixels[ids >= 0][:_PICTURES].to(parts.device))
    if not len(images):
        return
    split = split_of(parts.config, torch.arange(len(images), device=parts.device), parts.module.encoder.grid**2)
    title = f"{run.folder.title}: {parts.method_name}, step {run.step}, epoch {run.epoch:.1f}"
    sheet = reconstruction_sheet(parts.module, images, split, teacher=bool(parts.teachers), title=title)
    if run.metrics is not None:
        with ignore_write_errors(path := picture_path(run)):
            sheet.save(path)
        run.metrics.picture(run.step, "reconstruction", np.asarray(sheet))


def probe(run: Run, parts: Pretraining, val_index: ShardIndex) -> None:
    """Run kNN and a linear probe if due: fitted on training images, scored on validation images. Collective."""
    data, log = parts.config.data, parts.config.log
    knn, linear = run.due(log.knn_every_epochs), run.due(log.probe_every_epochs)
    if not (knn or linear):
        return
    context = EvalContext.of_run(run)
    view: dict[str, Any] = {"size": data.image_size, "crop_pct": data.eval_crop}
    bank, queries = (
        pooled_features(parts.module, index, random_subset(index, log.knn_images), context, **view)
        for index in (parts.index, val_index)
    )
    scores = {"knn": knn_accuracy(bank, queries, device=run.device)} if knn else {}
    if linear and len(bank[1]) > 1:
        scores["linear"] = probe_accuracy(bank, queries, device=run.device)
    elif linear and distributed.is_main():
        warn("no linear probe: it needs two training images that can be decoded")
    if run.metrics is not None and scores:
        images, asked = len(queries[1]), min(log.knn_images, len(val_index))
        run.metrics.write(run.step, {**scores, "images": images, "bad_images": asked - images, "epoch": run.epoch})
        names = {"knn": "kNN {:.1%} (a trend, no forecast)", "linear": "linear probe {:.1%}"}
        summary = ", ".join(names[name].format(accuracy) for name, accuracy in scores.items())
        say(f"epoch {run.epoch:.1f}  {summary}")
