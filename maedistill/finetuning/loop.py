"""Fine-tuning: the loop over optimizer steps, and the exact evaluation between epochs.

    shards -> crops, RandAugment -> flip, normalise, erase, mix -> network -> cross-entropy, terms -> engine
                                             teachers of distillation, the network's past, if any

Everything random is a function of (seed, position) or (seed, step, micro-batch, rank). A restart in the same layout
therefore needs only the step, and reproduces every bit.

    m micro-batch   C classes   s image side
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from maedistill.config.finetune import FinetuneConfig
from maedistill.data.images.augment import seed_generators
from maedistill.escaping import say
from maedistill.evaluation.accuracy import evaluate
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import Predictor
from maedistill.finetuning.build import build_labelled_crops
from maedistill.finetuning.objective import Ensemble, Mutual
from maedistill.finetuning.pictures import input_sheet
from maedistill.finetuning.self_terms import exit_networks
from maedistill.finetuning.setup import Finetuning, open_finetuning
from maedistill.processes import distributed
from maedistill.randomness import Stream
from maedistill.report.interactive import require_bokeh
from maedistill.report.run_page import refresh_run
from maedistill.report.run_report import write_finetune_report
from maedistill.runs.callback import Callback
from maedistill.runs.objects import NOTHING, Objects
from maedistill.runs.records import ignore_write_errors
from maedistill.runs.run import Run
from maedistill.runs.start import run_stage


def finetune(
    config: FinetuneConfig,
    *,
    objects: Objects = NOTHING,
    callbacks: Sequence[Callback] = (),
    fresh: bool = False,
    extend: bool = False,
) -> None:
    """Run or continue a fine-tuning run to its end. Every rank calls it.

    objects: what a Python caller gives in place of what the config names.
    fresh: delete the run in the folder and start over. extend: allow a larger number of epochs.
    Raises subclasses of UserError; RUN/exit.json records how the run ended.
    """
    if config.log.report:
        require_bokeh()
    try:
        run_stage(
            config,
            open_stage=partial(open_finetuning, objects=objects),
            train=train,
            write_report=write_finetune_report,
            callbacks=callbacks,
            fresh=fresh,
            extend=extend,
        )
    finally:
        refresh_run(config.run, create=config.log.report)  # exit.json says by now how it ended


def train(run: Run, parts: Finetuning) -> None:
    """Run the training loop to the end of the run. Collective."""
    config, plan, engine, rank = parts.config, parts.plan, run.engine, distributed.rank()
    crops = build_labelled_crops(config, parts.index, parts.samples, mean=parts.mean)
    batches = run.batches(crops)
    if parts.past is not None:
        parts.past.begin(run, crops.order)
    if evaluation_due(run, parts) and run.is_missing("ema_top1" if run.ema is not None else "top1"):
        with run.untimed():
            validate(run, parts)

    if parts.codistillation is not None:
        with run.untimed():
            parts.codistillation.meet(run)

    for step in range(run.step, plan.steps):
        if parts.codistillation is not None:
            with run.untimed():
                parts.codistillation.exchange(run)
        run.schedule.step_update(step)
        for micro in range(plan.batch.accumulation):
            batch = run.next(batches)
            seed_generators(config.seed, Stream.NETWORK, step, micro, rank)  # erasing, mixing, drop path
            images, targets = parts.inputs(batch)  # [m, 3, s, s], [m, C]
            # Teachers see the same mixed images.
            losses = engine(images, targets, *parts.teacher_outputs(images, step, batch))
            engine.backward(losses["loss"])
            engine.step()
            if parts.past is not None:
                parts.past.add(batch, losses)
            run.count(batch, losses)
        run.end_step()

        # Log: the only place where the host waits for the device.
        if run.should_log:
            run.log()
        if run.step == 1:
            with run.untimed():
                draw(run, parts, images, targets)

        # Save, evaluate: each on its own period, neither counted as training time. Saving comes first, so that an
        # evaluation that fails costs no training.
        with run.untimed():
            if run.should_save:
                run.save()
            if evaluation_due(run, parts):
                validate(run, parts)
        run.raise_if_preempted()


def draw(run: Run, parts: Finetuning, images: Tensor, targets: Tensor) -> None:
    """Draw the last micro-batch of the step just done on rank 0: images [m, 3, s, s], targets [m, C]."""
    if run.metrics is None:
        return
    labelled = targets if parts.config.distill.reads_labels else None
    title = f"{run.folder.title}: input of step {run.step}"
    sheet = input_sheet(images, labelled, channels=parts.channels, classes=parts.index.classes, title=title)
    with ignore_write_errors(path := run.folder.pictures / "input.png"):
        sheet.save(path)
    run.metrics.picture(run.step, "input", np.asarray(sheet))


def networks_of(module: Any) -> dict[str, nn.Module]:
    """Return the networks that are scored, by the prefix of their metrics: the student, its exits, its peers, all."""
    networks = {"": module.vit, **exit_networks(module)}
    if isinstance(module, Mutual):
        networks |= {f"peer{number}_": peer for number, peer in enumerate(module.peers, 1)}
        networks["ensemble_"] = Ensemble([module.vit, *module.peers])
    return networks


def evaluation_due(run: Run, parts: Finetuning) -> bool:
    """Return whether to evaluate after the step just done."""
    return run.step == parts.plan.steps or run.due(parts.config.log.eval_every_epochs)


def validate(run: Run, parts: Finetuning) -> None:
    """Measure top-1 and top-5 of every network on every validation image, and of its moving average. Collective."""
    networks = networks_of(parts.module)
    if run.ema is not None:
        networks |= {f"ema_{name}": network for name, network in networks_of(run.ema.module).items()}
    context = EvalContext.of_run(run)
    predictors = {
        name: Predictor(network, context, mean=parts.mean, std=parts.std) for name, network in networks.items()
    }
    scores = {name: evaluate(predictor, parts.validation(), context).score for name, predictor in predictors.items()}
    if run.metrics is not None:
        records = []
        for prefix, score in scores.items():
            values = score.metrics()
            values["val_loss"] = values.pop("loss")
            record = {"epoch": run.epoch, **{prefix + name: value for name, value in values.items()}}
            if prefix.endswith("ensemble_"):
                averaged = prefix.removesuffix("ensemble_")
                each = [scores[averaged + name].top1 for name in networks_of(parts.module) if name != "ensemble_"]
                record |= {f"{averaged}mean_top1": sum(each) / len(each), f"{averaged}best_top1": max(each)}
            records.append(record)
            say(f"epoch {run.epoch:.1f}  {prefix.replace('_', ' ')}{score.line()}")
        run.metrics.write(run.step, *records)
        refresh_run(parts.config.run, create=parts.config.log.report)
