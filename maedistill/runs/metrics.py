"""What a run says while it runs: averages without host syncs, metrics.jsonl, TensorBoard events, the progress line."""

import json
import math
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maedistill.errors import DataError
from maedistill.processes import ranks as distributed
from maedistill.runs.records import AppendOnlyFile, warn, write_text

_CPU = torch.device("cpu")
_BEARABLE = 0.05  # share of the time that may go by in waiting for data
_PATIENCE = 3  # log intervals above it in a row, before a person is told


class Averages:
    """Running sums of the finite values of named scalars; they stay on their device until somebody reads them."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds one micro-batch's losses."""
        for name, value in values.items():
            value = value.detach()
            finite = value.isfinite()
            self.sums[name] = self.sums.get(name, 0) + torch.where(finite, value, 0)
            self.counts[name] = self.counts.get(name, 0) + finite

    def read(self) -> dict[str, float]:
        """Means since the last read, over all ranks (a collective), and a fresh start. This waits for the device.

        nan where no value was finite.
        """
        names, counts = list(self.sums), {f"count of {name}": count for name, count in self.counts.items()}
        means = distributed.all_reduce_mean(self.sums | counts)
        self.sums, self.counts = {}, {}
        return {name: means[name] / (means[f"count of {name}"] or math.nan) for name in names}


class MetricsFile:
    """metrics.jsonl and, where tensorboard is installed, TensorBoard events. Kept by rank 0 alone.

    A run that continues at step s drops lines of steps above s: they belong to work that was lost and is done again.
    """

    def __init__(self, folder: Path, *, first_step: int, tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        write_text(self.path, "".join(line for line, record in _lines(folder) if record["step"] <= first_step))
        self.lines = AppendOnlyFile(self.path)
        self.board = _tensorboard(folder / "tb", first_step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one object; numbers also go to TensorBoard. JSON has no inf or nan: they become null."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.lines.append(json.dumps({"step": step, **values}))
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._show(lambda board: [board.add_scalar(name, value, step) for name, value in numbers.items()])

    def picture(self, step: int, name: str, pixels: Any) -> None:
        """Shows an image [H, W, 3] of uint8 in TensorBoard."""
        self._show(lambda board: board.add_image(name, pixels, step, dataformats="HWC"))

    def close(self) -> None:
        """Flushes both. Raises DataError where the disk does not take the last lines of metrics.jsonl."""
        self._show(lambda board: board.close())
        self.lines.close()

    def _show(self, act: Callable[[Any], object]) -> None:
        """Does something with TensorBoard's events, which nobody gets any more once a disk was full."""
        if self.board is None:
            return
        try:
            act(self.board)
        except OSError as error:
            self.board = None
            warn(f"no more TensorBoard events in this start: {error}")


@contextmanager
def open_metrics(folder: Path, *, first_step: int, tensorboard: bool) -> Iterator[MetricsFile | None]:
    """The metrics of a run on rank 0, None on the others; closed at the block's end."""
    if not distributed.is_main():
        yield None
        return
    metrics = MetricsFile(folder, first_step=first_step, tensorboard=tensorboard)
    try:
        yield metrics
    except BaseException:
        with suppress(DataError):  # the error that ends the run is the news
            metrics.close()
        raise
    metrics.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete lines of a run's metrics.jsonl; a last line that was cut by a kill is left out.

    Raises DataError for a file that no run has written.
    """
    return [record for _, record in _lines(folder)]


def _lines(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each complete line and what it says; one at a time, since a long run has many."""
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


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("no TensorBoard events: tensorboard is not installed (pip install tensorboard)", flush=True)
        return None
    return SummaryWriter(folder, purge_step=first_step + 1)  # hides what a lost or failed start wrote above it


class Clock:
    """Measure where the time of a run goes: images per second, and the share of it in which `device` waits for data.

    A GPU works through a queue, and the host may block on the loader while it does. So the wait of a GPU is measured on
    its own time line: from the event that ends one micro-batch to the event that begins the next one.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self._device = device
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # not yet passed by the GPU
        self.trained = 0.0  # seconds of training up to the last read, pauses left out
        self.restart()

    def restart(self) -> None:
        """Begin an interval: nothing seen, nothing waited for."""
        self._pairs.clear()
        self.waited, self.images, self.start = 0.0, 0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting for data. On a GPU: only while its queue is empty."""
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

    def pause(self, since: float) -> None:
        """Leave the time from `since` until now out: saving, pictures, kNN."""
        self.start += time.perf_counter() - since

    def read(self) -> tuple[float, float]:
        """Return images per second and waiting share since the last read. To be called when the device is idle."""
        self._collect()
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        rate, share = self.images / elapsed, self.waited / elapsed
        self.trained += elapsed
        self.restart()
        return rate, share

    def _collect(self) -> None:
        """Add up the pairs that the GPU has passed, without waiting for it."""
        while self._pairs and self._pairs[0][1].query():
            begin, end = self._pairs.popleft()
            self.waited += begin.elapsed_time(end) / 1000


class DataWaitHint:
    """Says once what to do where training keeps waiting for images: `_PATIENCE` intervals in a row above `_BEARABLE`.

    The first interval does not count: in it the loader's processes start and caches are cold.
    """

    def __init__(self) -> None:
        self._seen = self._in_a_row = 0

    def note(self, share: float, *, workers: int) -> str | None:
        """The hint, the first time that it is due. share: of the interval spent waiting; workers: loader processes."""
        self._seen += 1
        if self._in_a_row < _PATIENCE and self._seen > 1:
            self._in_a_row = self._in_a_row + 1 if share > _BEARABLE else 0
            if self._in_a_row == _PATIENCE:
                return wait_hint(share, workers=workers)
        return None


def wait_hint(share: float, *, workers: int) -> str:
    """What helps a run that waits for images."""
    decoder = "" if find_spec("simplejpeg") else "a faster JPEG decoder (pip install simplejpeg), "
    return (
        f"hint     {share:.0%} of the time is spent waiting for images. What helps: more loader processes "
        f"(data.workers, now {workers}), {decoder}smaller images (tools/make_shards.py --shorter-side 256), in "
        "pre-training several crops of each decoded image (data.views_per_image); "
        "tools/benchmark.py loader measures them"
    )


def duration(seconds: float) -> str:
    """`8h51m`, `12m04s`, `37s`."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


def progress_line(
    losses: Mapping[str, float], values: Mapping[str, float], *, step: int, total_steps: int, epochs: float
) -> str:
    """The line that a person watches: every loss term, then speed, waiting, memory and time left."""
    terms = ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if name != "loss")
    return (
        f"epoch {values['epoch']:.1f}/{epochs:g}  step {step}/{total_steps}  loss {losses['loss']:.4f} ({terms})  "
        f"lr {values['lr']:.2e}  grad {values['grad_norm']:.3g}  {values['images_per_second']:.0f} img/s/rank  "
        f"wait {values['data_wait']:.0%}  mem {values['memory_gb']:.1f} GB  eta {duration(values['eta_seconds'])}"
    )


def memory_gb(device: torch.device) -> float:
    """Most memory this process has used so far: of its GPU, or of the machine where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
