"""Fine-tuning: the loop over optimizer steps, and the exact evaluation between epochs.

    shards -> crops, RandAugment -> flip, normalise, erase, mix -> network -> cross-entropy, terms -> engine
                                                             teachers of distillation, if any

Everything random is a function of (seed, position) or (seed, step, micro-batch, rank). A restart in the same layout
therefore needs only the step, and reproduces every bit.

    m micro-batch   C classes   s image side
"""

from maedistill.config.finetune import FinetuneConfig
from maedistill.data.images.augment import seed_generators
from maedistill.data.loading.loader import training_batches
from maedistill.evaluation.accuracy import evaluate
from maedistill.finetuning.build import build_labelled_crops
from maedistill.finetuning.setup import Finetuning, open_finetuning
from maedistill.machine import precision
from maedistill.processes import distributed
from maedistill.randomness import Stream
from maedistill.report.run_report import write_finetune_report
from maedistill.runs.folder import RunFolder
from maedistill.runs.metrics import Averages, MetricsFile
from maedistill.runs.run import Run
from maedistill.runs.start import joined, start_run


def finetune(config: FinetuneConfig, *, fresh: bool = False, extend: bool = False) -> None:
    """Run or continue a fine-tuning run to its end. Every rank calls it.

    fresh: refuse a folder that already holds a run. extend: allow a larger number of epochs.
    Raises subclasses of UserError; RUN/exit.json records how the run ended.
    """
    folder = RunFolder(config.run)
    with joined(config, folder) as peers:
        parts = open_finetuning(config, world_size=distributed.world_size(), device=distributed.device())
        with start_run(parts, folder, peers, fresh=fresh, extend=extend) as run, run.resume() as metrics:
            train(run, parts, metrics)
        report = distributed.on_main(lambda: write_finetune_report(folder))
        if distributed.is_main():
            print(f"done: {report}", flush=True)


def train(run: Run, parts: Finetuning, metrics: MetricsFile | None) -> None:
    """Run the training loop to the end of the run. Collective."""
    config, plan, engine, rank = parts.config, parts.plan, run.engine, distributed.rank()
    crops = build_labelled_crops(config, parts.index, parts.samples, mean=parts.mean)
    batches = training_batches(
        crops,
        run.step,
        plan.steps,
        plan=plan.batch,
        rank=rank,
        world_size=distributed.world_size(),
        workers=run.workers,
        device=run.device,
        timeout_seconds=config.data.timeout_seconds,
        max_batch_wait=run.max_batch_wait,
    )
    averages = Averages()

    for step in range(run.step, plan.steps):
        run.schedule.step_update(step)
        for micro in range(plan.batch.accumulation):
            with run.clock.waiting():
                batch = next(batches)
            run.peers.beat(step)
            seed_generators(config.seed, Stream.NETWORK, step, micro, rank)  # erasing, mixing, drop path
            images, targets = parts.inputs(batch)  # [m, 3, s, s], [m, C]
            losses = engine(images, targets, *parts.teacher_outputs(images, step))  # teachers see the same mixed images
            engine.backward(losses["loss"])
            engine.step()
            averages.add(losses)
            run.clock.images += len(images)
            run.replaced += batch.bad
        run.end_step(crops)

        # Log: the only place where the host waits for the device.
        if run.should_log:
            run.log(averages, metrics)

        # Evaluate, save: each on its own period, neither counted as training time. Saving comes last: otherwise a
        # run killed during the evaluation would resume after it, and the evaluation would be missing.
        with run.untimed():
            if run.step == plan.steps or run.due(config.log.eval_every_epochs):
                validate(run, parts, metrics)
            if run.should_save:
                run.save()
        run.raise_if_preempted()


def validate(run: Run, parts: Finetuning, metrics: MetricsFile | None) -> None:
    """Measure top-1 and top-5 on every validation image, for the weights and their moving average. Collective."""
    networks = {"": parts.module.vit} | ({"ema_": run.ema.module.vit} if run.ema is not None else {})
    for prefix, network in networks.items():
        found = evaluate(
            network,
            parts.validation(),
            mean=parts.mean,
            std=parts.std,
            batch=parts.plan.batch.micro_batch,
            workers=run.workers,
            device=run.device,
            precision=precision(parts.config.engine.precision, run.device),
            timeout_seconds=parts.config.data.timeout_seconds,
        )
        if metrics is not None:
            values = {"top1": found.top1, "top5": found.top5, "images": found.images, "val_loss": found.loss}
            metrics.write(run.step, {"epoch": run.epoch, **{prefix + name: value for name, value in values.items()}})
            print(f"epoch {run.epoch:.1f}  {prefix.replace('_', ' ')}{found.line()}", flush=True)
