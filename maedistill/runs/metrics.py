"""Metrics of a running run: averages without host syncs, metrics.jsonl, what trackers get, the progress line."""

import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maedistill.config.schema import RunConfig
from maedistill.errors import DataError, Preempted
from maedistill.escaping import warn
from maedistill.processes import distributed
from maedistill.runs.history import duration, metric_lines
from maedistill.runs.records import AppendOnlyFile, write_text
from maedistill.runs.trackers.background import close_trackers, open_trackers
from maedistill.runs.trackers.tracker import End, scalars_of


class Averages:
    """Running sums of the finite values of named scalars; they stay on their device until `read`.

    In float64, sums of fp32 losses are exact: they do not depend on the order, so an interval that a restart cuts in
    two has the same means.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's losses."""
        for name, value in values.items():
            value = value.detach().double()
            finite = value.isfinite()
            self.sums[name] = self.sums.get(name, 0) + torch.where(finite, value, 0)
            self.counts[name] = self.counts.get(name, 0) + finite

    def read(self) -> dict[str, float]:
        """Return the means over all ranks since the last read, and reset the sums. Collective.

        A mean without finite values is nan. Waits for the device.
        """
        totals = self.totals()
        self.sums, self.counts = {}, {}
        return {name: total / (count or math.nan) for name, (total, count) in totals.items()}

    def totals(self) -> dict[str, list[float]]:
        """Return {name: [sum, count]} over all ranks since the last read. Waits for the device. Collective.

        A term that some ranks lack counts where it is: a method of the caller's may have one for some images only.
        """
        names = dict.fromkeys(name for each in distributed.gather_objects(list(self.sums)) for name in each)
        zero = torch.zeros((), dtype=torch.float64, device=distributed.device())
        pairs = {name: (self.sums.get(name, zero), self.counts.get(name, zero)) for name in names}
        values = distributed.all_reduce_sum({f"{i} {name}": pair[i] for name, pair in pairs.items() for i in (0, 1)})
        return {name: [values[f"0 {name}"], values[f"1 {name}"]] for name in names}

    def restore(self, totals: Mapping[str, Sequence[float]], *, device: torch.device) -> None:
        """Continue from the totals of all ranks: rank 0 takes them, the others begin at 0."""
        share = 1 if distributed.is_main() else 0
        for name, (total, count) in totals.items():
            self.sums[name] = torch.tensor(share * total, dtype=torch.float64, device=device)
            self.counts[name] = torch.tensor(share * count, dtype=torch.float64, device=device)


class MetricsFile:
    """Writes metrics.jsonl, and hands its numbers and pictures on to trackers. Only rank 0 has one.

    every: steps between two records of losses. A run that resumes at step s drops the lines of steps above s, because
    it repeats these steps, and what is no line of ours, such as the torn end after a power cut. last_names: what is
    recorded of step s.
    """

    def __init__(self, folder: Path, *, first_step: int, every: int = 1, trackers: Sequence[str] = ()) -> None:
        self.path = folder / "metrics.jsonl"
        kept, damaged = [], 0
        written: dict[str, int] = {}  # the newest step of each tag
        for line, record in metric_lines(self.path):
            damaged += record is None
            if record is not None:
                written |= dict.fromkeys(scalars_of(record), record["step"])
                if record["step"] <= first_step:
                    kept.append((line, record))
        steps = sorted({0, *(record["step"] for _, record in kept)})
        gap = max((later - earlier for earlier, later in pairwise(steps)), default=every)
        if damaged or steps[-1] + gap <= first_step > steps[-1]:
            last = f"step {steps[-1]} as its last one" if steps[-1] else "no line"
            what = f"{damaged} lines that cannot be read, which are left out" if damaged else last
            warn(f"{self.path} has {what}: records up to step {first_step} may be missing")
        self.last_names = {name for _, record in kept if record["step"] == first_step for name in record}
        write_text(self.path, "".join(line for line, _ in kept))
        self.lines = AppendOnlyFile(self.path)
        self.observers: Sequence[Callable[[int, Mapping[str, Any]], object]] = ()  # called with every object
        history = [record for _, record in kept]
        self.trackers = open_trackers(trackers, folder, first_step=first_step, written=written, history=history)

    def write(self, step: int, *objects: Mapping[str, Any]) -> None:
        """Append objects, in one piece: a kill leaves all or none. Numbers also go to trackers.

        JSON has no inf or nan, so they become null.
        """
        written = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            for values in objects
        ]
        self.lines.append(*(json.dumps({"step": step, **values}) for values in written))
        for values in written:
            for observe in self.observers:
                observe(step, values)
            for tracker in self.trackers:
                tracker.scalars(step, values)

    def picture(self, step: int, name: str, pixels: Any) -> None:
        """Hand an image, uint8 [H, W, 3], on to trackers."""
        for tracker in self.trackers:
            tracker.picture(step, name, pixels)

    def close(self, end: End = "finished", *, patience: float = 30.0) -> None:
        """Flush, and close the trackers. Raises DataError if the last lines of metrics.jsonl cannot be written."""
        try:
            self.lines.close()
        finally:
            close_trackers(self.trackers, end, time.monotonic() + patience)


@contextmanager
def open_metrics(
    folder: Path, config: RunConfig, *, first_step: int, closing: Callable[[], AbstractContextManager[None]]
) -> Iterator[MetricsFile | None]:
    """Yield the metrics file on rank 0, None on the others; close it at the end of the block, within `closing`."""
    if not distributed.is_main():
        yield None
        return
    metrics = MetricsFile(folder, first_step=first_step, every=config.log.every_steps, trackers=config.log.trackers)
    try:
        yield metrics
    except BaseException as error:
        with closing(), suppress(DataError):  # the error that ends the run matters more
            end: End = "killed" if isinstance(error, Preempted | KeyboardInterrupt) else "failed"
            metrics.close(end, patience=3.0)  # the other ranks wait, or whoever sent the signal
        raise
    with closing():
        metrics.close(patience=min(30.0, config.engine.timeout_seconds / 3))


def progress_line(
    losses: Mapping[str, float], values: Mapping[str, float], *, step: int, total_steps: int, epochs: float
) -> str:
    """Format the progress line: every loss term, then speed, waiting, memory and time left."""
    terms = ", ".join(f"{name} {_digits(value)}" for name, value in losses.items() if name != "loss")
    return (
        f"epoch {values['epoch']:.1f}/{epochs:g}  step {step}/{total_steps}  loss {losses['loss']:.4f} ({terms})  "
        f"lr {values['lr']:.2e}  grad {values['grad_norm']:.3g}  {values['images_per_second']:.0f} img/s/rank  "
        f"wait {values['data_wait']:.0%}  mem {values['memory_gb']:.1f} GB  eta {duration(values['eta_seconds'])}"
    )


def _digits(value: float) -> str:
    """Format a loss: four decimals, or three digits of a small one."""
    return f"{value:.4f}" if abs(value) >= 0.01 or not value else f"{value:.3g}"


def status_line(loss: float, rate: float, seconds_left: float, *, step: int, total: int) -> str:
    """Format the status line: the loss is that of the last logged interval, nan before there is one."""
    fields = [f"step {step}/{total}"]
    if math.isfinite(loss):
        fields.append(f"loss {loss:.4f}")
    if math.isfinite(seconds_left):
        fields += [f"{rate:.0f} img/s/rank", f"eta {duration(seconds_left)}"]
    return "  ".join(fields)


def memory_gb(device: torch.device) -> float:
    """Return the peak memory of this process so far, in GB: of its GPU, or of the machine if it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
