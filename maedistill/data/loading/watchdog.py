"""Watchdog for loader workers: raise an error that names the sample at which a worker died or hung.

    worker: its row of the table (process id, sample, whether it fetches the sample's shard) -> WorkerWatchdog -> error

The workers share the table with the training process. torch's own timeout applies to batches, which may be large; this
one applies to samples. Also, some of torch's waits have no timeout: it receives a batch from its worker over a socket,
and waits for ever if that worker was stopped, or hangs while it holds the GIL. So a thread watches the workers and
kills all of them if they hang, which ends any such wait.

    W workers
"""

import mmap
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import numpy as np

from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.reader import ShardReader
from maedistill.errors import DataError, PeerError, UserError, join_first
from maedistill.processes.diagnosis import process_state

PID, SAMPLE, FETCHING = range(3)  # columns of the table
IDLE = -1  # instead of a sample id

_PERIOD = 1.0  # seconds between two checks
_END = 5.0  # seconds to wait for killed workers to end; one that waits for a dead disk may not end
_NAMED = 3  # samples that an error names at most
_REMEDIES: dict[int, str] = {
    signal.SIGKILL: "if the memory ran out (see dmesg), take fewer loader workers (data.workers) or more memory",
    signal.SIGBUS: "a file that it had mapped into memory was cut short, or its disk failed: look at that sample",
}
_STATES = {"": "is gone", "T": "is stopped", "t": "is being traced", "D": "waits for a disk", "Z": "has ended"}
_RESTART = "the same command continues from the last checkpoint"


class WorkerWatchdog:
    """Watches the workers of one loader. Its thread refers to this, not to the batches, which may be freed at any time.

    table: the workers' shared state, int64 [W, 3]. timeout_seconds, max_batch_wait: as in `load_batches`.
    """

    def __init__(
        self,
        processes: list[BaseProcess],
        table: np.ndarray,
        reader: ShardReader,
        *,
        timeout_seconds: float,
        max_batch_wait: float,
    ) -> None:
        self.waits = 0  # odd while the training process waits for a batch
        self._processes, self._table, self._owner = processes, table, os.getpid()
        self._index, self._longest_fetch = reader.index, reader.longest_fetch
        self._timeout, self._max_batch_wait = timeout_seconds, max_batch_wait
        self._hang: UserError | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="loader-watch", daemon=True).start()

    def diagnose(self, seconds: float) -> UserError | None:
        """Return the error for workers that hung, or that end within some seconds; None if all run."""
        ended = wait([process.sentinel for process in self._processes], timeout=seconds)
        for process in self._processes:
            if process.sentinel in ended:
                process.join(_END)  # the sentinel fires shortly before the exit code is available
        dead = [(process.pid, process.exitcode) for process in self._processes if process.exitcode is not None]
        if self._hang is not None or not dead:
            return self._hang
        pid, code = dead[0]
        sample = {row[PID]: row[SAMPLE] for row in self._table.tolist()}.get(pid, IDLE)
        place = "between two batches" if sample == IDLE else f"at {self._index.sample_name(sample)}"
        if code >= 0:
            end, remedy = f"ended with exit code {code}", "look at the messages above it, and at that sample"
        else:
            end = f"was killed by signal {-code} ({signal.strsignal(-code)})"
            remedy = _REMEDIES.get(-code, "look at that sample; a decoder that crashes is worth a report")
        return PeerError(f"a loader worker (process {pid}) {end}, {place}", f"{remedy}; {_RESTART}")

    def kill(self, *, only_busy: bool = False) -> None:
        """Kill all workers and stop the watchdog's thread, or kill only the workers that are reading a sample.

        SIGKILL also ends stopped processes. Do nothing in a fork of the process that owns the workers.
        """
        if os.getpid() != self._owner:
            return
        busy = self._table[self._table[:, SAMPLE] != IDLE, PID].tolist()
        processes = [process for process in self._processes if not only_busy or process.pid in busy]
        if not only_busy:
            self._ended.set()
        for process in processes:
            process.kill()
        deadline = time.monotonic() + _END
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                # the kernel ends it once its disk responds; until then neither we nor multiprocessing's exit may wait
                multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]

    def _watch(self) -> None:
        """Run the thread. It counts periods and reads no clock, because Ctrl-Z stops this process and its workers."""
        period = min(_PERIOD, self._timeout / 2, self._max_batch_wait / 2)
        table, waits, quiet = self._table.copy(), 0, 0.0
        while not self._ended.wait(period):
            is_quiet = waits == self.waits and waits % 2 and np.array_equal(table, self._table)
            table, waits, quiet = self._table.copy(), self.waits, quiet + period if is_quiet else 0.0
            is_fetching = (table[:, SAMPLE] != IDLE) & (table[:, FETCHING] == 1)  # [W]
            if quiet >= min(self._timeout + is_fetching.any() * self._longest_fetch, self._max_batch_wait):
                self._hang = _describe_hang(table, quiet, self._index)
                for process in self._processes:
                    process.kill()
                return


def new_table(workers: int) -> np.ndarray:
    """Return int64 [W, 3] in memory shared with processes forked from now on. It is freed with the last of them."""
    table = np.frombuffer(mmap.mmap(-1, 3 * 8 * workers), dtype=np.int64).reshape(workers, 3)  # [W, 3]
    table[:, SAMPLE] = IDLE
    return table


def _describe_hang(table: np.ndarray, seconds: float, index: ShardIndex) -> UserError:
    rows = [row for row in table.tolist() if row[SAMPLE] != IDLE]
    if not rows:
        pids = table[:_NAMED, PID].tolist()
        states = ", ".join(f"process {pid} {_STATES.get(process_state(pid), 'waits')}" for pid in pids)
        return PeerError(
            f"no batch came for {seconds:.0f} s, though no loader worker is at a sample: {states}",
            f"see what stopped them; {_RESTART}",
        )
    places = [
        f"process {pid} {'waits for the shard of' if fetching else 'is at'} {index.sample_name(sample)}"
        for pid, sample, fetching in rows
    ]
    return DataError(
        f"{len(rows)} of {len(table)} loader workers have not moved for {seconds:.0f} s: "
        f"{join_first(places, _NAMED, separator='; ')}",
        "check the disk, network drive or server that does not answer, and start again; a larger "
        "engine.timeout_seconds allows more",
    )
