"""Prefetch batches, in order, in worker processes that a watchdog observes and that end with the batches' owner.

    images.__getitems__ in a worker -> queue -> load_batches -> batch, or the UserError that was raised in the worker

A worker that dies or hangs causes an error that names its sample, never an endless wait: see `watchdog.py`.
"""

import atexit
import functools
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, get_worker_info

from maedistill.data.loading.watchdog import FETCHING, IDLE, PID, SAMPLE, Images, WorkerWatchdog, new_table
from maedistill.errors import UserError
from maedistill.processes.parent_death import detach_worker

TIMEOUT_SECONDS = 300.0
_ASKING = 1.0  # seconds of waiting for a batch between two queries of the watchdog
_DETECTING, _ENDING = 2.0, 30.0  # seconds to wait for the end of a worker; of one that may be writing a core dump


def load_batches(
    images: Images,
    *,
    workers: int,
    timeout_seconds: float = TIMEOUT_SECONDS,
    max_batch_wait: float = math.inf,
    **keywords: Any,
) -> Iterator[Any]:
    """Return an iterator over `images.__getitems__` of each batch of ids. It starts `workers` processes at once.

    timeout_seconds: how long a wait for a batch may last in which no worker starts or finishes a sample. While a worker
    downloads a remote shard, the limit grows by `RetryPolicy.longest`, the limit of a download.
    max_batch_wait: upper limit of the two together, so that this error ends the run before any other timeout does.
    keywords: for torch's DataLoader.

    A `UserError` in a worker is raised here unchanged. Raise `PeerError` for a worker that died, `DataError` for
    workers that hang. With workers=0 there is no watchdog.
    """
    carrier = _ForwardErrors(images)
    if workers:
        limits = {"timeout_seconds": timeout_seconds, "max_batch_wait": max_batch_wait}
        return _WatchedBatches(carrier, workers=workers, limits=limits, **keywords)
    return map(_unpack, DataLoader(carrier, collate_fn=_unchanged, **keywords))


class _ForwardErrors(Dataset[Any]):
    """Returns a `UserError` as a value, because torch would turn one raised in a worker into a RuntimeError.

    In a worker it also updates that worker's row of the watchdog's table.
    """

    def __init__(self, images: Images) -> None:
        self.images = images
        self._row: np.ndarray | None = None  # int64 [3]

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, ids: list[int]) -> Any:
        """Return the batch of these ids, or the `UserError` that `images` raised."""
        try:
            return self.images.__getitems__(ids)
        except UserError as error:
            return error
        finally:
            if self._row is not None:
                self._row[SAMPLE] = IDLE

    def watch(self, row: np.ndarray) -> None:
        """Register `row` as the table row of this worker process."""
        self._row = row
        row[PID] = os.getpid()
        self.images.reader.note = self._note

    def _note(self, sample: int, fetching: bool) -> None:
        self._row[SAMPLE], self._row[FETCHING] = sample, fetching


class _WatchedBatches:
    """An iterator over the batches, in order. Its worker processes end with it, on any error, and at exit."""

    def __init__(self, carrier: _ForwardErrors, *, workers: int, limits: dict[str, float], **keywords: Any) -> None:
        table = new_table(workers)  # [W, 3]
        loader = DataLoader(
            carrier,
            num_workers=workers,
            collate_fn=_unchanged,
            timeout=_ASKING,
            worker_init_fn=functools.partial(_begin_work, table),
            multiprocessing_context="fork",
            **keywords,
        )
        self._batches, processes = _start(loader)
        self._watch = WorkerWatchdog(processes, table, carrier.images, **limits)
        # multiprocessing waits for its children at exit, and detached workers ignore its SIGTERM
        atexit.register(self._watch.kill)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return _unpack(self._wait())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the workers, which is safe because they hold no state that must be saved."""
        self._watch.kill_busy()  # busy workers may hang; torch shuts down idle ones when the iterator is freed
        self._batches = iter(())
        self._watch.kill()
        atexit.unregister(self._watch.kill)

    def __del__(self) -> None:
        if hasattr(self, "_watch"):
            self.close()

    def _wait(self) -> Any:
        """Return torch's next batch, or raise our error: outside of `except`, so that torch's traceback is not kept."""
        self._watch.turns += 1
        verdict = None
        while verdict is None:
            try:
                batch = next(self._batches)
            except (RuntimeError, OSError, EOFError) as error:
                is_late = str(error).startswith("DataLoader timed out")
                is_broken = isinstance(error, ConnectionError | EOFError)  # the socket of a worker that is ending
                verdict = self._watch.judge(0 if is_late else _ENDING if is_broken else _DETECTING)
                if verdict is None and not is_late:
                    raise
            else:
                self._watch.turns += 1
                return batch
        raise verdict


def _start(loader: DataLoader) -> tuple[Iterator[Any], list[BaseProcess]]:
    """Start torch's iterator. Return it and its worker processes."""
    others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    # when a worker dies, torch's SIGCHLD handler would raise anywhere in this process, even while it saves a checkpoint
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return batches, [child for child in multiprocessing.active_children() if child not in others]


def _begin_work(table: np.ndarray, worker: int) -> None:
    """Set up a worker process. It must end with its parent; torch ends orphaned workers too, but not one that hangs."""
    detach_worker()
    # Use abstract sockets for the batches, because a killed worker would leave a named socket in the file system.
    multiprocessing.connection.arbitrary_address = lambda family: f"\0maedistill-{uuid.uuid4().hex}"
    get_worker_info().dataset.watch(table[worker])


def _unpack(batch: Any) -> Any:
    if isinstance(batch, UserError):
        raise batch
    return batch


def _unchanged(batch: Any) -> Any:
    return batch
