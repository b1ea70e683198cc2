"""A run under way: the engine, its schedule and counters, restored and saved; the same for every stage.

What a stage adds (data, teacher, losses) is in its parts: `pretraining.py`, `finetuning.py`.
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
from maedistill.data.loader import RandomCrops
from maedistill.data.reader import sample_name
from maedistill.errors import DataError, NumericsError, Preempted
from maedistill.plan import Plan
from maedistill.training import distributed
from maedistill.training.engine import Engine
from maedistill.training.interrupt import StopRequest
from maedistill.training.metrics import Averages, Clock, MetricsFile, WaitHint, memory_gb, open_metrics, progress_line
from maedistill.training.nonfinite import NonfiniteUpdates
from maedistill.training.peers import Peers
from maedistill.training.records import Lines
from maedistill.training.restore import load_latest
from maedistill.training.run_folder import RunFolder
from maedistill.training.saver import Saver

_LEAST_SEEN = 10_000  # samples that data.max_bad_fraction is a share of at least, so that one bad image ends no run


@dataclass
class Run:
    """The engine and how far it is, on this rank. `with` it: afterwards its checkpoints are written."""

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
    stop: StopRequest
    clock: Clock = field(init=False)
    hint: WaitHint = field(default_factory=WaitHint)
    step: int = 0  # steps done
    leaving: bool = False  # a signal asked for the end of the process
    shift: int = 0  # batches passed over so far: step s takes batch s + shift
    bad: float = 0.0  # samples replaced so far, over all ranks
    replaced: list[str] = field(default_factory=list)  # those of this rank that are not counted yet
    nonfinite: NonfiniteUpdates = field(default_factory=NonfiniteUpdates)
    returns: int = 0  # to the newest checkpoint, since it was written
    _records: list[Lines] = field(default_factory=list)  # of rank 0: what must be on the disk before a checkpoint is
    _next_batch: int | None = None  # where data goes on after a return

    @property
    def longest_wait(self) -> float:
        """Seconds that a batch may take, so that the error says which sample is missing before any rank gives up."""
        return 0.75 * self.config.engine.timeout_seconds

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

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)
        self._bad_samples = Lines(self.folder.bad_samples, unique=True)
        self._left_out = Lines(self.folder.nonfinite, unique=True)

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
    def attempt(self) -> Iterator[MetricsFile | None]:
        """From the newest checkpoint on, with the metrics file open on rank 0. Collective."""
        self.restore()
        log = self.config.log
        with open_metrics(self.folder.path, first_step=self.step, tensorboard=log.tensorboard) as metrics:
            if metrics is not None:
                self._records = [metrics.lines, self._bad_samples, self._left_out]
            self.clock.restart()
            yield metrics

    @contextmanager
    def aside(self) -> Iterator[None]:
        """For what is no training, such as saving and evaluating: it counts as no training time, and may take long."""
        start = time.perf_counter()
        with self.peers.paused():
            yield
        self.clock.pause(start)

    def restore(self) -> None:
        """Goes on from the newest complete checkpoint, if there is one. Collective."""
        self.saver.settle()
        state = load_latest(self.folder.checkpoints, self.engine, ema=self.ema)
        if state is None:
            if self.config.engine.nonfinite == "rollback":
                self.save()  # the place to return to
                self.saver.settle()  # before workers are forked, which would keep its copies
            return
        self._require_known(state)
        self.step, self.shift, self.bad = state["step"], state["shift"], state["bad"]
        if self._next_batch is None:
            self.clock.trained = state["trained_seconds"]
            self.nonfinite = NonfiniteUpdates(state["nonfinite"], state["nonfinite_in_a_row"])
        else:
            self.shift = self._next_batch - self.step
        if distributed.is_main():
            print(f"continues at step {self.step} of {self.plan.steps} from {self.folder.checkpoints}", flush=True)

    def save(self) -> None:
        """Takes a checkpoint, which is written while training goes on. Collective."""
        self.count_replaced()
        self.saver.save(step=self.step, engine=self.engine, state=self._state(), ema=self.ema, records=self._records)
        self.returns, self._next_batch = 0, None

    def _state(self) -> dict[str, int | float]:
        """What a checkpoint keeps of the loop."""
        return {
            "step": self.step,
            "shift": self.shift,
            "bad": self.bad,
            "nonfinite": self.nonfinite.total,
            "nonfinite_in_a_row": self.nonfinite.in_a_row,
            "trained_seconds": self.clock.trained,
        }

    def _require_known(self, state: dict[str, Any]) -> None:
        """Raises DataError where a checkpoint keeps other things of the loop than this version does."""
        known = self._state()
        odd = sorted(name for name in known | state if type(state.get(name)) is not type(known.get(name)))
        if odd:
            raise DataError(
                f"the newest checkpoint in {self.folder.checkpoints} is of another version: its state differs in "
                f"{', '.join(odd)}",
                "continue with the version that the run began with, or use another run=",
            )

    def end_step(self, crops: RandomCrops) -> bool:
        """Counts the step whose update was just made. Collective. False: begin again, at the newest checkpoint.

        Raises NumericsError where the numbers are the end of the run.
        """
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.module, step=self.step)
        self.peers.beat(self.step)
        self.leaving = self.stop.agreed() and self.step < self.plan.steps
        return self._judge_update(crops)

    @property
    def logs(self) -> bool:
        """Whether losses are to be read after the step just done: the only time when the host waits for the device."""
        return self.step % self.config.log.every == 0 or self.step == self.plan.steps or self.leaving

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is to be taken after the step just done."""
        return self.due(self.config.log.save_every_epochs) or self.leaving

    def leave_if_asked(self) -> None:
        """Raises Preempted at the end of a step in which a signal asked for it, its checkpoint written. Collective."""
        if self.leaving:
            with self.peers.paused():
                self.saver.close()
            raise Preempted(self.stop.signal.name, self.step)

    def _judge_update(self, crops: RandomCrops) -> bool:
        """Follows `engine.nonfinite` where the loss or gradient of an update was not finite; no such update is applied.

        The verdict on an update is known one step later, or at once where a checkpoint or the end comes next.
        """
        settings = self.config.engine
        now = self.step == self.plan.steps or self.saves
        steps = self.nonfinite.note(self.step - 1, self.engine.broken, now=now)
        for step in steps:
            self._note_nonfinite(step, crops)
        if not steps:
            return True
        again = settings.nonfinite == "rollback"
        self.returns += again
        if settings.nonfinite == "stop" or max(self.nonfinite.in_a_row, self.returns) > settings.most_nonfinite:
            often = f"after {self.returns} returns" if again else f"{self.nonfinite.in_a_row} in a row"
            raise NumericsError(
                f"the loss or the gradient of step {steps[-1] + 1} is not finite, {often} "
                f"(engine.nonfinite={settings.nonfinite}); {self.folder.nonfinite} names its samples",
                "look at them, or start another run= with a lower optim.base_lr or optim.clip=1; no checkpoint has "
                "such numbers",
            )
        if again:
            self._next_batch = steps[-1] + self.shift + 1
        return not again

    def _note_nonfinite(self, step: int, crops: RandomCrops) -> None:
        """Writes down the samples of an update that was not applied."""
        if not distributed.is_main():
            return
        batch, size = step + self.shift, self.config.optim.global_batch
        samples = crops.order.samples(torch.arange(batch * size, (batch + 1) * size)).unique().tolist()
        note = {"step": step + 1, "samples": [sample_name(crops.index, sample) for sample in samples]}
        self._left_out.append(json.dumps(note))
        print(f"step {step + 1} is not applied: its loss or gradient is not finite", file=sys.stderr, flush=True)

    def log(self, averages: Averages, metrics: MetricsFile | None) -> None:
        """Writes and prints the losses since the last time. Collective."""
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
        """What metrics.jsonl records beside the losses. Waits for the device."""
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
        """Lists the samples that could not be decoded, and ends the run when they are too many. Collective."""
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
