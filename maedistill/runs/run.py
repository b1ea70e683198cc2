"""A run in progress: the engine, its schedule and counters, restored and saved in the same way for every stage.

What a stage adds (data, teacher, losses) is in `pretraining/setup.py` and `finetuning/setup.py`.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from maedistill.config.schema import RunConfig
from maedistill.data.loading.loader import RandomCrops
from maedistill.data.shards.reader import sample_name
from maedistill.errors import DataError, NumericsError, Preempted
from maedistill.processes import distributed
from maedistill.processes.heartbeat import Peers
from maedistill.processes.preemption import PreemptionHandler
from maedistill.runs.async_saver import Saver
from maedistill.runs.folder import RunFolder
from maedistill.runs.metrics import Averages, Clock, DataWaitHint, MetricsFile, memory_gb, open_metrics, progress_line
from maedistill.runs.plan import Plan
from maedistill.runs.records import AppendOnlyFile
from maedistill.runs.restore import load_latest
from maedistill.training.engine import Engine
from maedistill.training.nonfinite import NonfiniteUpdates

_LEAST_SEEN = 10_000  # max_bad_fraction is taken of at least this many samples, so one bad image cannot end a run


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
    peers: Peers
    saver: Saver
    stop: PreemptionHandler
    clock: Clock = field(init=False)
    hint: DataWaitHint = field(default_factory=DataWaitHint)
    step: int = 0  # steps done
    leaving: bool = False  # a signal asked the process to end
    bad: float = 0.0  # samples replaced so far, over all ranks
    replaced: list[str] = field(default_factory=list)  # samples of this rank that are not counted yet
    nonfinite: NonfiniteUpdates = field(default_factory=NonfiniteUpdates)
    _records: list[AppendOnlyFile] = field(
        default_factory=list
    )  # rank 0: files that must be flushed before a checkpoint is written

    @property
    def max_batch_wait(self) -> float:
        """Return the seconds that a batch may take: the error names the missing sample before any rank times out."""
        return 0.75 * self.config.engine.timeout_seconds

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

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)
        self._bad_samples = AppendOnlyFile(self.folder.bad_samples, unique=True)
        self._left_out = AppendOnlyFile(self.folder.nonfinite, unique=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.peers.paused():
            self.saver.__exit__(kind, error, trace)
        if kind is None:
            self.stop.close()

    @contextmanager
    def resume(self) -> Iterator[MetricsFile | None]:
        """Resume from the newest checkpoint, with the metrics file open on rank 0. Collective."""
        self.restore()
        log = self.config.log
        with open_metrics(self.folder.path, first_step=self.step, tensorboard=log.tensorboard) as metrics:
            if metrics is not None:
                self._records = [metrics.lines, self._bad_samples, self._left_out]
            self.clock.restart()
            yield metrics

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Exclude the block, such as saving or evaluating, from training time and from the hang watchdog."""
        start = time.perf_counter()
        with self.peers.paused():
            yield
        self.clock.pause(start)

    def restore(self) -> None:
        """Load the newest complete checkpoint, if there is one. Collective."""
        state = load_latest(self.folder.checkpoints, self.engine, ema=self.ema)
        if state is None:
            return
        self._require_known(state)
        self.step, self.bad = state["step"], state["bad"]
        self.clock.trained = state["trained_seconds"]
        self.nonfinite = NonfiniteUpdates(state["nonfinite"], state["nonfinite_in_a_row"])
        if distributed.is_main():
            print(f"continues at step {self.step} of {self.plan.steps} from {self.folder.checkpoints}", flush=True)

    def save(self) -> None:
        """Take a checkpoint, which is written while training goes on. Collective."""
        self.count_replaced()
        self.saver.save(step=self.step, engine=self.engine, state=self._state(), ema=self.ema, records=self._records)

    def _state(self) -> dict[str, int | float]:
        """Return the loop's state that a checkpoint keeps."""
        return {
            "step": self.step,
            "bad": self.bad,
            "nonfinite": self.nonfinite.total,
            "nonfinite_in_a_row": self.nonfinite.in_a_row,
            "trained_seconds": self.clock.trained,
        }

    def _require_known(self, state: dict[str, Any]) -> None:
        """Raise DataError if a checkpoint's loop state has other keys or types than this version's."""
        known = self._state()
        odd = sorted(name for name in known | state if type(state.get(name)) is not type(known.get(name)))
        if odd:
            raise DataError(
                f"the newest checkpoint in {self.folder.checkpoints} is of another version: its state differs in "
                f"{', '.join(odd)}",
                "continue with the version that the run began with, or use another run=",
            )

    def end_step(self, crops: RandomCrops) -> None:
        """Count the step whose update was just made. Collective.

        Raises NumericsError if `engine.nonfinite` says that non-finite numbers end the run.
        """
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.module, step=self.step)
        self.peers.beat(self.step)
        self.leaving = self.stop.agreed() and self.step < self.plan.steps
        self._handle_nonfinite(crops)

    @property
    def should_log(self) -> bool:
        """Return whether to read losses after the step just done: the only time when the host waits for the device."""
        return self.step % self.config.log.every_steps == 0 or self.step == self.plan.steps or self.leaving

    @property
    def should_save(self) -> bool:
        """Return whether to take a checkpoint after the step just done."""
        return self.due(self.config.log.save_every_epochs) or self.leaving

    def raise_if_preempted(self) -> None:
        """Raise Preempted, with a checkpoint written, after a step in which a signal asked for it. Collective."""
        if self.leaving:
            with self.peers.paused():
                self.saver.close()
            raise Preempted(self.stop.signal.name, self.step)

    def _handle_nonfinite(self, crops: RandomCrops) -> None:
        """Apply `engine.nonfinite` to updates whose loss or gradient was not finite. Such updates are never applied.

        The result of an update is known one step later, or at once if a checkpoint or the end comes next.
        """
        settings = self.config.engine
        now = self.step == self.plan.steps or self.should_save
        steps = self.nonfinite.note(self.step - 1, self.engine.broken, now=now)
        for step in steps:
            self._note_nonfinite(step, crops)
        if steps and (settings.nonfinite == "stop" or self.nonfinite.in_a_row > settings.max_nonfinite):
            raise NumericsError(
                f"the loss or the gradient of step {steps[-1] + 1} is not finite, {self.nonfinite.in_a_row} in a row "
                f"(engine.nonfinite={settings.nonfinite}); {self.folder.nonfinite} names its samples",
                "look at them, or start another run= with a lower optim.base_lr or optim.clip=1; no checkpoint has "
                "such numbers",
            )

    def _note_nonfinite(self, step: int, crops: RandomCrops) -> None:
        """Record the samples of an update that was not applied."""
        if not distributed.is_main():
            return
        size = self.config.optim.global_batch
        samples = crops.order.samples(torch.arange(step * size, (step + 1) * size)).unique().tolist()
        note = {"step": step + 1, "samples": [sample_name(crops.index, sample) for sample in samples]}
        self._left_out.append(json.dumps(note))
        print(f"step {step + 1} is not applied: its loss or gradient is not finite", file=sys.stderr, flush=True)

    def log(self, averages: Averages, metrics: MetricsFile | None) -> None:
        """Write and print the losses since the last call. Collective."""
        means = averages.read()
        self.count_replaced()
        values = means | self.measure()
        if metrics is not None:
            metrics.write(self.step, values)
            position = {"step": self.step, "total_steps": self.plan.steps, "epochs": self.config.optim.epochs}
            print(progress_line(means, values, **position), flush=True)
            if hint := self.hint.note(values["data_wait"], workers=self.workers):
                print(hint, flush=True)

    def measure(self) -> dict[str, float]:
        """Return what metrics.jsonl records beside the losses. Waits for the device."""
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
            "nonfinite": self.nonfinite.total,
            "eta_seconds": left / rate,
            "trained_seconds": self.clock.trained,
        }

    def count_replaced(self) -> None:
        """Record the samples that could not be decoded. Collective. Raises DataError if they are too many."""
        replaced = [line for lines in distributed.gather_objects(self.replaced) for line in lines]
        if replaced and distributed.is_main():
            self._bad_samples.append(*sorted(replaced))
        self.bad += len(replaced)
        self.replaced = []
        seen = max(_LEAST_SEEN, self.step * self.config.optim.global_batch)
        if self.bad > self.config.data.max_bad_fraction * seen:
            raise DataError(
                f"{self.bad:.0f} bad samples, more than data.max_bad_fraction={self.config.data.max_bad_fraction:g} "
                "allows",
                f"see {self.folder.bad_samples}; repair the shards or raise the limit",
            )
