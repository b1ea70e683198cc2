"""Batches from worker processes: made ahead, in order, by processes under watch that end with the batches' owner.

    images.__getitems__ in a worker -> queue -> load_batches -> batch, or the UserError that it met

A worker that dies or hangs is an error that names its sample, never a wait: see `watchdog.py`.
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
_ASKING = 1.0  # seconds of waiting for a batch after which the watch is asked for its verdict
_DETECTING, _ENDING = 2.0, 30.0  # seconds for a death to show; for a crash, of which the system may write a core dump


def load_batches(
    images: Images,
    *,
    workers: int,
    timeout_seconds: float = TIMEOUT_SECONDS,
    max_batch_wait: float = math.inf,
    **keywords: Any,
) -> Iterator[Any]:
    """What `images.__getitems__` makes of each batch of ids, from `workers` processes that start now.

    timeout_seconds: how long all workers together may make no progress, by samples, while a batch is waited for. A
    remote shard that is on its way has bounds of its own (`Patience`): as long as one is, its `longest` comes on top.
    longest_wait: what both together may not exceed, so that it is this error that ends a run.
    keywords: torch's for its DataLoader.

    A `UserError` in a worker is raised here as it was there. Raises `PeerError` for a worker that died, `DataError` for
    workers that hang. With workers=0 nobody watches.
    """
    carrier = _ForwardErrors(images)
    if workers:
        limits = {"timeout_seconds": timeout_seconds, "max_batch_wait": max_batch_wait}
        return _WatchedBatches(carrier, workers=workers, limits=limits, **keywords)
    return map(_unpack, DataLoader(carrier, collate_fn=_unchanged, **keywords))


class _ForwardErrors(Dataset[Any]):
    """Hands a `UserError` over as a value (raised in a worker, torch would make a RuntimeError of its traceback).

    In a worker it keeps that worker's row of the table.
    """

    def __init__(self, images: Images) -> None:
        self.images = images
        self._row: np.ndarray | None = None  # int64 [3]

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, ids: list[int]) -> Any:
        """What `images` has for a batch of ids, or why it has nothing."""
        try:
            return self.images.__getitems__(ids)
        except UserError as error:
            return error
        finally:
            if self._row is not None:
                self._row[SAMPLE] = IDLE

    def watch(self, row: np.ndarray) -> None:
        """Called in the worker that keeps `row`."""
        self._row = row
        row[PID] = os.getpid()
        self.images.reader.note = self._note

    def _note(self, sample: int, fetching: bool) -> None:
        self._row[SAMPLE], self._row[FETCHING] = sample, fetching


class _WatchedBatches:
    """The batches, in order, and the processes that make them; these end with it, with any error, and at exit."""

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
        # multiprocessing waits for its children at exit, and quiet ones do not heed its SIGTERM
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
        """Ends the workers. They hold nothing that a kill could hurt."""
        self._watch.kill_busy()  # who may hang; the idle ones torch ends in peace, when its last reference goes
        self._batches = iter(())
        self._watch.kill()
        atexit.unregister(self._watch.kill)

    def __del__(self) -> None:
        if hasattr(self, "_watch"):
            self.close()

    def _wait(self) -> Any:
        """torch's next batch, or an error of ours; raised outside of `except`, or torch's traceback would live on."""
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
    """torch's iterator, and the processes that it started."""
    others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    # torch's alarm for workers that die would go off wherever this process is, in the middle of a checkpoint as well
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return batches, [child for child in multiprocessing.active_children() if child not in others]


def _begin_work(table: np.ndarray, worker: int) -> None:
    """What a worker does first. torch ends workers whose parent ends, too, but not one that hangs."""
    detach_worker()
    # The sockets over which batches travel get no name in the file system, where a kill would leave it behind.
    multiprocessing.connection.arbitrary_address = lambda family: f"\0maedistill-{uuid.uuid4().hex}"
    get_worker_info().dataset.watch(table[worker])


def _unpack(batch: Any) -> Any:
    if isinstance(batch, UserError):
        raise batch
    return batch


def _unchanged(batch: Any) -> Any:
    return batch
