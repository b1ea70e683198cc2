"""Prefetch batches, in order, in worker processes that a watchdog observes and that end with the batches' owner.

    images.__getitems__ in a worker -> queue -> load_batches -> batch, or the UserError that was raised in the worker

A worker that dies or hangs causes an error that names its sample, never an endless wait: see `watchdog.py`.
"""

import atexit
import math
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from maedistill.data.loading.fork_context import FileFreeForkContext
from maedistill.data.loading.watchdog import FETCHING, IDLE, PID, SAMPLE, WorkerWatchdog, new_table
from maedistill.data.shards.reader import ShardReader
from maedistill.errors import UserError
from maedistill.processes.parent_death import detach_worker, signals_held

TIMEOUT_SECONDS = 300.0
_ASKING = 1.0  # seconds of waiting for a batch between two queries of the watchdog
_DETECTING, _ENDING = 2.0, 30.0  # seconds to wait for the end of a worker; of one that may be writing a core dump


class Images(Dataset[Any]):
    """A data set that returns whole batches: `images.__getitems__(ids)` is one batch."""

    reader: ShardReader

    def __getitems__(self, ids: list[int]) -> Any:
        raise NotImplementedError


def load_batches(
    images: Images,
    batches: Iterable[list[int]],
    *,
    workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
    timeout_seconds: float = TIMEOUT_SECONDS,
    max_batch_wait: float = math.inf,
) -> Iterator[Any]:
    """Return an iterator over `images.__getitems__(ids)` for the ids of each batch. Start `workers` processes at once.

    prefetch: batches that each worker prepares in advance. pin_memory: for copies to a GPU.
    timeout_seconds: how long a wait for a batch may last in which no worker starts or finishes a sample. While a worker
    downloads a remote shard, the limit grows by `RetryPolicy.max_seconds`, the limit of a download.
    max_batch_wait: upper limit of the two together, so that this error ends the run before any other timeout does.

    A `UserError` in a worker is raised here unchanged. Raise `PeerError` for a worker that died, `DataError` for
    workers that hang. With workers=0 there is no watchdog.
    """
    options: dict[str, Any] = {"batch_sampler": batches, "collate_fn": lambda batch: batch, "pin_memory": pin_memory}
    if not workers:
        return iter(DataLoader(images, **options))
    observed = _ObservedImages(images, new_table(workers))
    loader = DataLoader(
        observed,
        num_workers=workers,
        prefetch_factor=prefetch,
        timeout=_ASKING,
        worker_init_fn=observed.begin_worker,
        multiprocessing_context=FileFreeForkContext(),
        **options,
    )
    others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
    with signals_held():
        iterator = iter(loader)
    # when a worker dies, torch's SIGCHLD handler would raise anywhere in this process, even while it saves a checkpoint
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    processes = [child for child in multiprocessing.active_children() if child not in others]
    watchdog = WorkerWatchdog(
        processes, observed.table, images.reader, timeout_seconds=timeout_seconds, max_batch_wait=max_batch_wait
    )
    return _WatchedBatches(iterator, watchdog)


class _ObservedImages(Dataset[Any]):
    """The data set of the workers. It reports each sample in the watchdog's table, int64 [W, 3], W workers.

    It returns a `UserError` as a value, because torch would turn one raised in a worker into a RuntimeError.
    """

    def __init__(self, images: Images, table: np.ndarray) -> None:
        self.images, self.table = images, table

    def __getitems__(self, ids: list[int]) -> Any:
        """Return the batch of these ids, or the `UserError` that `images` raised."""
        try:
            return self.images.__getitems__(ids)
        except UserError as error:
            return error
        finally:
            self._row[SAMPLE] = IDLE

    def begin_worker(self, worker: int) -> None:
        """Set up this worker process. It must end with its parent; torch ends orphans too, but not one that hangs."""
        detach_worker()
        # Use abstract sockets for the batches, because a killed worker would leave a named socket in the file system.
        connection.arbitrary_address = lambda family: f"\0maedistill-{uuid.uuid4().hex}"  # type: ignore[attr-defined]
        self._row = self.table[worker]  # int64 [3]
        self._row[PID] = os.getpid()
        self.images.reader.on_read = self._report

    def _report(self, sample: int, fetching: bool) -> None:
        self._row[SAMPLE], self._row[FETCHING] = sample, fetching


class _WatchedBatches:
    """An iterator over the batches, in order. Its worker processes end with it, on any error, and at exit."""

    def __init__(self, batches: Iterator[Any], watchdog: WorkerWatchdog) -> None:
        self._batches, self._watchdog = batches, watchdog
        # multiprocessing waits for its children at exit, and detached workers ignore its SIGTERM
        atexit.register(watchdog.kill)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._watchdog.waits += 1
        try:
            batch = self._next()
            if isinstance(batch, UserError):
                raise batch
        except BaseException:
            self.close()
            raise
        self._watchdog.waits += 1
        return batch

    def close(self) -> None:
        """Kill the workers, which is safe because they hold no state that must be saved."""
        self._watchdog.kill(only_busy=True)  # they may hang
        self._batches = iter(())  # torch shuts idle ones down when its iterator is freed
        self._watchdog.kill()
        atexit.unregister(self._watchdog.kill)

    __del__ = close

    def _next(self) -> Any:
        """Return torch's next batch, or raise our error: outside of `except`, so that torch's traceback is not kept."""
        failure = None
        while failure is None:
            try:
                return next(self._batches)
            except (RuntimeError, OSError, EOFError) as error:
                is_late = str(error).startswith("DataLoader timed out")
                is_broken = isinstance(error, ConnectionError | EOFError)  # the socket of a worker that is ending
                failure = self._watchdog.diagnose(0 if is_late else _ENDING if is_broken else _DETECTING)
                if failure is None and not is_late:
                    raise
        raise failure
