"""A run in progress: the engine, its schedule and counters, restored and saved in the same way for every stage.

What a stage adds (data, teacher, losses) is in `pretraining/setup.py` and `finetuning/setup.py`.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Self

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from maedistill.config.plan import Plan
from maedistill.config.schema import RunConfig
from maedistill.data.loading.batch import Batch
from maedistill.data.loading.decoded_cache import keep_decoded
from maedistill.data.loading.loader import RandomCrops, training_batches
from maedistill.errors import Preempted
from maedistill.escaping import say
from maedistill.processes import distributed
from maedistill.processes.heartbeat import RankWatch
from maedistill.processes.preemption import PreemptionHandler
from maedistill.runs.async_saver import Saver
from maedistill.runs.callback import Callback
from maedistill.runs.checkpoint import remove_strays
from maedistill.runs.clock import Clock, DataWaitHint
from maedistill.runs.folder import RunFolder
from maedistill.runs.metrics import (
    Averages,
    MetricsFile,
    memory_gb,
    open_metrics,
    progress_line,
    status_line,
)
from maedistill.runs.nonfinite import NonfinitePolicy
from maedistill.runs.progress import BadSampleLog, Progress
from maedistill.runs.records import AppendOnlyFile
from maedistill.runs.restore import load_latest
from maedistill.training.engine import Engine

_STATUS_SECONDS = 0.5  # between two status lines


@dataclass
class Run:
    """The engine and the progress of training, on this rank. A context manager: on exit all checkpoints are written."""

    config: RunConfig
    folder: RunFolder
    plan: Plan
    module: nn.Module
    engine: Engine
    schedule: CosineLRScheduler
    ema: ModelEmaV3 | None
    device: torch.device
    workers: int
    watch: RankWatch
    saver: Saver
    stop: PreemptionHandler
    extra_networks: Mapping[str, nn.Module]  # other networks of a checkpoint, by file name
    progress: Progress = field(default_factory=Progress)
    preempted: signal.Signals | None = None  # the signal that asks the run to end before its last step
    callbacks: tuple[Callback, ...] = ()
    before_save: list[Callable[[int], None]] = field(default_factory=list)  # what a checkpoint of a step counts on

    def __post_init__(self) -> None:
        self.clock, self.averages, self.hint = Clock(self.device), Averages(), DataWaitHint()
        most = self.config.engine.max_nonfinite
        self.nonfinite = NonfinitePolicy(self.folder.nonfinite, most=most, sample_names=self._sample_names)
        self.bad_samples = BadSampleLog(self.folder.bad_samples, self.config)
        self._loss, self._status_shown = math.nan, 0.0  # the loss of the last logged interval
        self.metrics: MetricsFile | None = None  # on rank 0, while the run is open
        self._crops: RandomCrops | None = None  # of the step in progress
        self._records: list[AppendOnlyFile] = []  # rank 0: files that are flushed before a checkpoint is written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self.watch.paused():
            self.saver.__exit__(kind, *error)
        if kind is None:
            self.stop.close()

    # Resuming and saving

    @contextmanager
    def resume(self) -> Iterator[None]:
        """Resume from the newest checkpoint, with the metrics file open on rank 0. Collective."""
        self.restore()
        with open_metrics(self.folder.path, self.config, first_step=self.step, closing=self.watch.paused) as metrics:
            self.metrics = metrics
            if metrics is not None:
                self._records = [metrics.lines, self.bad_samples.lines, self.nonfinite.lines]
                metrics.observers = [callback.on_metrics for callback in self.callbacks]
            for callback in self.callbacks:
                callback.on_start(self)
            self.clock.restart()
            yield

    def restore(self) -> None:
        """Load the newest complete checkpoint, if there is one. Collective."""
        distributed.on_main(lambda: remove_strays(self.folder.checkpoints))  # a finished run writes no more checkpoints
        state = load_latest(self.folder.checkpoints, self.engine, extra_networks=self.extra_networks)
        if state is None:
            return
        self.progress = Progress.from_state(state, checkpoints=self.folder.checkpoints)
        self.averages.restore(self.progress.losses, device=self.device)
        if distributed.is_main():
            say(f"continues at step {self.step} of {self.plan.steps} from {self.folder.checkpoints}")

    def save(self) -> None:
        """Take a checkpoint, which is written while training goes on. Collective."""
        self.nonfinite.count_last(self.progress)
        for sync in self.before_save:
            sync(self.step)
        self.bad_samples.count(self.progress)
        now = {"losses": self.averages.totals(), "trained_seconds": self.progress.trained_seconds + self.clock.seconds}
        state = asdict(self.progress) | now
        self.saver.save(
            step=self.step, engine=self.engine, state=state, extra_networks=self.extra_networks, records=self._records
        )

    def raise_if_preempted(self) -> None:
        """Raise Preempted, with a checkpoint written, after a step in which a signal asked for it. Collective."""
        if self.preempted is not None:
            with self.watch.paused():
                self.saver.close()
            self.stop.ignore_notices()
            raise Preempted(self.preempted.name, self.step, command=self.folder.command)

    def is_missing(self, name: str) -> bool:
        """Return whether this start resumes after a step of which `name` was not recorded. Collective.

        A checkpoint is taken before an evaluation. So an evaluation that fails, or is killed, costs no training: the
        next start makes up for it.
        """
        metrics = self.metrics
        return self.step > 0 and distributed.on_main(lambda: metrics is not None and name not in metrics.last_names)

    # One step

    def batches(self, crops: RandomCrops) -> Iterator[Batch]:
        """Load the micro-batches of this rank from the next step to the last, on the device. Collective."""
        self._crops = crops
        line = keep_decoded(crops, self.config.data.keep_decoded)
        if line is not None and distributed.is_main():
            say(line)
        return training_batches(
            crops,
            self.step,
            self.plan.steps,
            plan=self.plan.batch,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            workers=self.workers,
            device=self.device,
            timeout_seconds=self.config.engine.loader_seconds,
            # The error names the missing sample before another rank times out.
            max_batch_wait=0.75 * self.config.engine.timeout_seconds,
        )

    def next(self, batches: Iterator[Batch]) -> Batch:
        """Return the next micro-batch, and count the wait for it."""
        with self.clock.waiting():
            batch = next(batches)
        self.watch.beat(self.step)
        self.show_status()
        return batch

    def count(self, batch: Batch, losses: dict[str, Tensor]) -> None:
        """Count a micro-batch: its images, its bad samples and its losses, which stay on the device."""
        self.averages.add(losses)
        self.clock.images += len(batch.images)
        self.bad_samples.add(batch.bad)

    def end_step(self) -> None:
        """Count the step whose update was just made. Collective.

        Raises NumericsError after more than `engine.max_nonfinite` updates in a row that are not finite.
        """
        self.progress.step += 1
        if self.ema is not None:
            self.ema.update(self.module, step=self.step)
        self.watch.beat(self.step)
        stop = self.stop.agreed()
        self.preempted = stop if self.step < self.plan.steps else None
        # A checkpoint and the end of the run need to know about this update now; otherwise it may be known later.
        now = self.step == self.plan.steps or self.should_save
        self.nonfinite.check(self.progress, self.engine.update_skipped, now=now)
        for callback in self.callbacks:
            callback.on_step(self)

    def _sample_names(self, step: int) -> list[str]:
        """Return the names of the samples of a step, counted from 0."""
        crops = self._crops
        assert crops is not None
        size = self.config.optim.global_batch
        samples = crops.order.samples(torch.arange(step * size, (step + 1) * size)).unique().tolist()
        return [crops.index.sample_name(sample) for sample in samples]

    def show_status(self) -> None:
        """Rewrite the status line, some times a second and only on a terminal. Never waits for the device."""
        terminal = self.folder.log.terminal
        if terminal is None or not terminal.shows_status or time.monotonic() - self._status_shown < _STATUS_SECONDS:
            return
        self._status_shown, rate = time.monotonic(), self.clock.images / self.clock.seconds
        terminal.status(status_line(self._loss, rate, self._seconds_left(rate), step=self.step, total=self.plan.steps))

    def _seconds_left(self, rate: float) -> float:
        """Return the seconds to the last step at `rate` images per second on each rank."""
        images = (self.plan.steps - self.step) * self.config.optim.global_batch / self.plan.world_size
        return images / rate if rate else math.inf

    # What is due after a step

    @property
    def step(self) -> int:
        """Return the steps done."""
        return self.progress.step

    @property
    def epoch(self) -> float:
        """Return the epochs done."""
        return self.plan.epoch_at(self.step)

    def due(self, every_epochs: float | None) -> bool:
        """Return whether the step just done crossed a multiple of `every_epochs` or was the last. None means never."""
        if every_epochs is None:
            return False
        period = self.plan.steps_in(every_epochs)
        return self.step == self.plan.steps or self.step // period > (self.step - 1) // period

    @property
    def should_log(self) -> bool:
        """Return whether to read losses after the step just done: the only time when the host waits for the device."""
        return self.step == self.plan.steps or self.step % self.config.log.every_steps == 0

    @property
    def should_save(self) -> bool:
        """Return whether to take a checkpoint after the step just done."""
        return self.due(self.config.log.save_every_epochs) or self.preempted is not None

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Exclude the block, such as saving or evaluating, from training time and from the hang watchdog."""
        with self.clock.paused(), self.watch.paused():
            yield

    def log(self) -> dict[str, float]:
        """Write, print and return the mean losses since the last call. Waits for the device. Collective."""
        means = self.averages.read()
        self.bad_samples.count(self.progress)
        norm = float(self.engine.grad_norm)
        rate, wait, seconds = self.clock.read()
        self.progress.trained_seconds += seconds
        self._loss = means["loss"]
        values = means | {
            "epoch": self.epoch,
            "lr": max(group["lr"] for group in self.engine.optimizer.param_groups),
            "grad_norm": norm,
            "images_per_second": rate,
            "data_wait": wait,
            "memory_gb": memory_gb(self.device),
            "nonfinite": self.progress.nonfinite,
            "eta_seconds": self._seconds_left(rate),
            "trained_seconds": self.progress.trained_seconds,
        }
        if self.metrics is not None:
            self.metrics.write(self.step, values)
            epochs = self.config.optim.epochs
            say(progress_line(means, values, step=self.step, total_steps=self.plan.steps, epochs=epochs))
            if hint := self.hint.note(values["data_wait"], workers=self.workers):
                say(hint)
        return means
