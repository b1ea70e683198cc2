"""Metrics of a running run: averages without host syncs, metrics.jsonl, TensorBoard events, the progress line."""

import json
import math
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maedistill.errors import DataError
from maedistill.escaping import say
from maedistill.processes import distributed
from maedistill.runs.records import AppendOnlyFile, warn, write_text

_MAX_WAIT_SHARE = 0.05  # share of the time that may be spent waiting for data
_OF_THE_MACHINE = {"images_per_second", "data_wait", "memory_gb", "eta_seconds", "trained_seconds"}
_INTERVALS = 3  # consecutive log intervals above it before the hint is printed


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
        """Return {name: [sum, count]} over all ranks since the last read. Waits for the device. Collective."""
        values = distributed.all_reduce_sum(self.sums | {f"count of {name}": n for name, n in self.counts.items()})
        return {name: [values[name], values[f"count of {name}"]] for name in self.sums}

    def restore(self, totals: Mapping[str, Sequence[float]], *, device: torch.device) -> None:
        """Continue from the totals of all ranks: rank 0 takes them, the others begin at 0."""
        share = 1 if distributed.is_main() else 0
        for name, (total, count) in totals.items():
            self.sums[name] = torch.tensor(share * total, dtype=torch.float64, device=device)
            self.counts[name] = torch.tensor(share * count, dtype=torch.float64, device=device)


class MetricsFile:
    """Writes metrics.jsonl and, if tensorboard is installed, TensorBoard events. Only rank 0 has one.

    A run that resumes at step s drops the lines of steps above s, because it repeats these steps.
    last_names: what is recorded of step s.
    """

    def __init__(self, folder: Path, *, first_step: int, tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [(line, record) for line, record in _lines(folder) if record["step"] <= first_step]
        self.last_names = {name for _, record in kept if record["step"] == first_step for name in record}
        write_text(self.path, "".join(line for line, _ in kept))
        self.lines = AppendOnlyFile(self.path)
        self.observers: Sequence[Callable[[int, Mapping[str, Any]], object]] = ()  # called with every object
        self.board = _tensorboard(folder, first_step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one object; numbers also go to TensorBoard. JSON has no inf or nan, so they become null."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.lines.append(json.dumps({"step": step, **values}))
        for observe in self.observers:
            observe(step, values)
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        tags = {board_tag(name, is_training="loss" in values): value for name, value in numbers.items()}
        self._show(lambda board: [board.add_scalar(tag, value, step) for tag, value in tags.items()])

    def picture(self, step: int, name: str, pixels: Any) -> None:
        """Write an image, uint8 [H, W, 3], to TensorBoard."""
        self._show(lambda board: board.add_image(name, pixels, step, dataformats="HWC"))

    def close(self) -> None:
        """Flush both. Raises DataError if the last lines of metrics.jsonl cannot be written."""
        self._show(lambda board: board.close())
        self.lines.close()

    def _show(self, act: Callable[[Any], object]) -> None:
        """Call `act` on the TensorBoard writer. On an OSError, such as a full disk, warn and write no more events."""
        if self.board is None:
            return
        try:
            act(self.board)
        except OSError as error:
            self.board = None
            warn(f"no more TensorBoard events in this start: {error}")


@contextmanager
def open_metrics(folder: Path, *, first_step: int, tensorboard: bool) -> Iterator[MetricsFile | None]:
    """Yield the metrics file on rank 0, None on the others; close it at the end of the block."""
    if not distributed.is_main():
        yield None
        return
    metrics = MetricsFile(folder, first_step=first_step, tensorboard=tensorboard)
    try:
        yield metrics
    except BaseException:
        with suppress(DataError):  # the error that ends the run matters more
            metrics.close()
        raise
    metrics.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read all complete lines of a run's metrics.jsonl, without a last line that a kill truncated.

    Raises DataError for a file that is not a run's metrics.
    """
    return [record for _, record in _lines(folder)]


def _lines(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each complete line and its record, one at a time because a long run has many."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    try:
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("}\n"):
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    raise ValueError("not all lines say their step")
                yield line, record
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read ({str(error)[:200]})", "restore it from a copy, or remove it"
        ) from error


def board_tag(name: str, *, is_training: bool) -> str:
    """Return the TensorBoard tag of a metric: sys/ for the machine, train/ for training, val/ for evaluations."""
    return f"{'sys' if name in _OF_THE_MACHINE else 'train' if is_training else 'val'}/{name}"


def _tensorboard(folder: Path, first_step: int) -> Any:
    """Open the event files of a run, with its settings as a text."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("no TensorBoard events: tensorboard is not installed (pip install tensorboard)")
        return None
    board = SummaryWriter(folder / "tb", purge_step=first_step + 1)  # hides later steps that a failed start wrote
    if (config := folder / "config.yaml").is_file():
        board.add_text("config", "".join(f"    {line}\n" for line in config.read_text().splitlines()), first_step)
    return board


class Clock:
    """Measures images per second, and the share of the time in which `device` waits for data.

    A GPU works through a queue while the host may block on the loader. So the wait of a GPU is measured on its own
    timeline: from the event that ends one micro-batch to the event that begins the next one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # not yet reached by the GPU
        self.restart()

    def restart(self) -> None:
        """Begin an interval: set images and waiting time to 0."""
        self._pairs.clear()
        self._stopped: float | None = None
        self.waited, self.images, self.start = 0.0, 0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting for data; on a GPU, only the time in which its queue is empty."""
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            self.waited += time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._pairs.append((begin, end))
        self._collect()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block, spent on saving, pictures or kNN."""
        self._stopped = time.perf_counter()
        yield
        self.start += time.perf_counter() - self._stopped
        self._stopped = None

    @property
    def seconds(self) -> float:
        """Return the seconds since the last read, without pauses, as the host sees them."""
        return max((self._stopped or time.perf_counter()) - self.start, 1e-9)

    def read(self) -> tuple[float, float, float]:
        """Return images per second, waiting share and seconds since the last read. Call it when the device is idle."""
        self._collect()
        elapsed = self.seconds
        rate, share = self.images / elapsed, self.waited / elapsed
        self.restart()
        return rate, share, elapsed

    def _collect(self) -> None:
        """Add up the pairs of events that the GPU has reached, without waiting for it."""
        while self._pairs and self._pairs[0][1].query():
            begin, end = self._pairs.popleft()
            self.waited += begin.elapsed_time(end) / 1000


class DataWaitHint:
    """A hint, given once, for runs that wait for images: `_INTERVALS` consecutive intervals above `_MAX_WAIT_SHARE`.

    The first interval does not count, because the loader's processes start in it and caches are cold.
    """

    def __init__(self) -> None:
        self._intervals = self._in_a_row = 0

    def note(self, share: float, *, workers: int) -> str | None:
        """Return the hint when it is first due. share: of the interval spent waiting; workers: loader processes."""
        self._intervals += 1
        if self._in_a_row == _INTERVALS or self._intervals == 1:
            return None
        self._in_a_row = self._in_a_row + 1 if share > _MAX_WAIT_SHARE else 0
        if self._in_a_row < _INTERVALS:
            return None
        decoder = "" if find_spec("simplejpeg") else "a faster JPEG decoder (pip install simplejpeg), "
        return (
            f"hint     {share:.0%} of the time is spent waiting for images. What helps: more loader processes "
            f"(data.workers, now {workers}), {decoder}smaller images (maedistill shards --shorter-side 256), in "
            "pre-training several crops of each decoded image (data.views_per_image); "
            "maedistill benchmark loader measures them"
        )


def duration(seconds: float) -> str:
    """Format seconds as `8h51m`, `12m04s` or `37s`."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


def progress_line(
    losses: Mapping[str, float], values: Mapping[str, float], *, step: int, total_steps: int, epochs: float
) -> str:
    """Format the progress line: every loss term, then speed, waiting, memory and time left."""
    terms = ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if name != "loss")
    return (
        f"epoch {values['epoch']:.1f}/{epochs:g}  step {step}/{total_steps}  loss {losses['loss']:.4f} ({terms})  "
        f"lr {values['lr']:.2e}  grad {values['grad_norm']:.3g}  {values['images_per_second']:.0f} img/s/rank  "
        f"wait {values['data_wait']:.0%}  mem {values['memory_gb']:.1f} GB  eta {duration(values['eta_seconds'])}"
    )


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
