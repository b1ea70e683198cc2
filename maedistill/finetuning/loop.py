"""Fine-tuning: the loop over optimizer steps, and the exact evaluation between epochs.

    shards -> crops, RandAugment -> flip, normalise, erase, mix -> network -> cross-entropy, terms -> engine
                                                             teachers of distillation, if any

Everything random is a function of (seed, position) or (seed, step, micro-batch, rank). A restart in the same layout
therefore needs only the step, and reproduces every bit.

    m micro-batch   C classes   s image side
"""

from collections.abc import Sequence
from functools import partial

from maedistill.config.finetune import FinetuneConfig
from maedistill.data.images.augment import seed_generators
from maedistill.escaping import say
from maedistill.evaluation.accuracy import evaluate
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import Predictor
from maedistill.finetuning.build import build_labelled_crops
from maedistill.finetuning.setup import Finetuning, open_finetuning
from maedistill.processes import distributed
from maedistill.randomness import Stream
from maedistill.report.run_report import write_finetune_report
from maedistill.runs.callback import Callback
from maedistill.runs.metrics import MetricsFile
from maedistill.runs.objects import NOTHING, Objects
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
    run_stage(
        config,
        open_stage=partial(open_finetuning, objects=objects),
        train=train,
        write_report=write_finetune_report,
        callbacks=callbacks,
        fresh=fresh,
        extend=extend,
    )


def train(run: Run, parts: Finetuning, metrics: MetricsFile | None) -> None:
    """Run the training loop to the end of the run. Collective."""
    config, plan, engine, rank = parts.config, parts.plan, run.engine, distributed.rank()
    crops = build_labelled_crops(config, parts.index, parts.samples, mean=parts.mean)
    batches = run.batches(crops)
    if evaluation_due(run, parts) and run.is_missing("ema_top1" if run.ema is not None else "top1", metrics):
        with run.untimed():
            validate(run, parts, metrics)

    for step in range(run.step, plan.steps):
        run.schedule.step_update(step)
        for micro in range(plan.batch.accumulation):
            batch = run.next(batches)
            seed_generators(config.seed, Stream.NETWORK, step, micro, rank)  # erasing, mixing, drop path
            images, targets = parts.inputs(batch)  # [m, 3, s, s], [m, C]
            losses = engine(images, targets, *parts.teacher_outputs(images, step))  # teachers see the same mixed images
            engine.backward(losses["loss"])
            engine.step()
            run.count(batch, losses)
        run.end_step(crops)

        # Log: the only place where the host waits for the device.
        if run.should_log:
            run.log(metrics)

        # Save, evaluate: each on its own period, neither counted as training time. Saving comes first, so that an
        # evaluation that fails costs no training.
        with run.untimed():
            if run.should_save:
                run.save()
            if evaluation_due(run, parts):
                validate(run, parts, metrics)
        run.raise_if_preempted()


def evaluation_due(run: Run, parts: Finetuning) -> bool:
    """Return whether to evaluate after the step just done."""
    return run.step == parts.plan.steps or run.due(parts.config.log.eval_every_epochs)


def validate(run: Run, parts: Finetuning, metrics: MetricsFile | None) -> None:
    """Measure top-1 and top-5 on every validation image, for the weights and their moving average. Collective."""
    networks = {"": parts.module.vit} | ({"ema_": run.ema.module.vit} if run.ema is not None else {})
    context = EvalContext(
        device=run.device,
        batch=parts.plan.batch.micro_batch,
        workers=run.workers,
        precision=parts.config.engine.precision,
        timeout_seconds=parts.config.data.timeout_seconds,
    )
    predictors = {
        name: Predictor(network, context, mean=parts.mean, std=parts.std) for name, network in networks.items()
    }
    scores = {name: evaluate(predictor, parts.validation(), context).score for name, predictor in predictors.items()}
    if metrics is not None:  # all records together, so that a kill does not leave half of them
        for prefix, score in scores.items():
            values = score.metrics()
            values["val_loss"] = values.pop("loss")
            metrics.write(run.step, {"epoch": run.epoch, **{prefix + name: value for name, value in values.items()}})
            say(f"epoch {run.epoch:.1f}  {prefix.replace('_', ' ')}{score.line()}")
