"""Time of a running run: images per second, the share of waiting for data, and a hint where that is large."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

_MAX_WAIT_SHARE = 0.05  # share of the time that may be spent waiting for data
_INTERVALS = 3  # consecutive log intervals above it before the hint is printed


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
