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
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.reader import ShardReader, sample_name
from maedistill.errors import DataError, PeerError, UserError

PID, SAMPLE, FETCHING = range(3)  # columns of the table
IDLE = -1  # instead of a sample id

_LOOK = 1.0  # seconds between two checks
_END = 5.0  # seconds to wait for killed workers to end; one that waits for a dead disk may not end
_SAID = 3  # maximum number of samples that an error names


class Images(Protocol):
    """A data set that returns whole batches."""

    index: ShardIndex
    reader: ShardReader

    def __getitems__(self, ids: list[int]) -> Any:
        """Return one batch."""


class WorkerWatchdog:
    """Watches the workers of one loader. Its thread refers to this, not to the batches, which may be freed at any time.

    table: the workers' shared state, int64 [W, 3]. timeout_seconds, max_batch_wait: as in `load_batches`.
    """

    def __init__(
        self,
        processes: list[BaseProcess],
        table: np.ndarray,
        images: Images,
        *,
        timeout_seconds: float,
        max_batch_wait: float,
    ) -> None:
        self.turns = 0  # odd while the training process waits for a batch
        self._processes, self._table, self._owner = processes, table, os.getpid()
        self._index, self._timeout, self._longest_fetch = images.index, timeout_seconds, images.reader.longest_fetch
        self._longest_wait = max_batch_wait
        self._hang: UserError | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._look, name="loader-watch", daemon=True).start()

    def judge(self, patience: float) -> UserError | None:
        """Return the error for workers that hung, or that end within `patience` seconds; None if all run."""
        ended = wait([process.sentinel for process in self._processes], timeout=patience)
        for process in self._processes:
            if process.sentinel in ended:
                process.join(_END)  # the sentinel fires shortly before the exit code is available
        dead = next((process for process in self._processes if process.exitcode is not None), None)
        if self._hang is not None or dead is None:
            return self._hang
        sample = {row[PID]: row[SAMPLE] for row in self._table.tolist()}.get(dead.pid, IDLE)
        at = "between two batches" if sample == IDLE else f"at {sample_name(self._index, sample)}"
        how, remedy = _cause_of_death(dead.exitcode)
        return PeerError(f"a loader worker (process {dead.pid}) {how}, {at}", remedy)

    def kill_busy(self) -> None:
        """Kill the workers that are reading a sample."""
        busy = set(self._table[self._table[:, SAMPLE] != IDLE, PID].tolist())
        self._kill([process for process in self._processes if process.pid in busy])

    def kill(self) -> None:
        """Kill all workers and stop the watchdog's thread."""
        self._ended.set()
        self._kill(self._processes)

    def _kill(self, processes: list[BaseProcess]) -> None:
        """Send SIGKILL, which also ends stopped processes. Do nothing in a fork of the process that owns them."""
        if os.getpid() != self._owner:
            return
        for process in processes:
            process.kill()
        deadline = time.monotonic() + _END
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                # the kernel ends it once its disk responds; until then neither we nor multiprocessing's exit may wait
                multiprocessing.process._children.discard(process)

    def _look(self) -> None:
        """Run the thread. It counts periods and reads no clock, because Ctrl-Z stops this process and its workers."""
        period = min(_LOOK, self._timeout / 2, self._longest_wait / 2)
        seen, turns, quiet = self._table.copy(), 0, 0.0
        while not self._ended.wait(period):
            is_quiet = turns == self.turns and turns % 2 and np.array_equal(seen, self._table)
            seen, turns, quiet = self._table.copy(), self.turns, quiet + period if is_quiet else 0.0
            is_fetching = (seen[:, SAMPLE] != IDLE) & (seen[:, FETCHING] == 1)  # [W]
            if quiet >= min(self._timeout + is_fetching.any() * self._longest_fetch, self._longest_wait):
                self._hang = _describe_hang(seen, quiet, self._index)
                for process in self._processes:
                    process.kill()
                return


def new_table(workers: int) -> np.ndarray:
    """Return int64 [W, 3] in memory shared with processes forked from now on. It is freed with the last of them."""
    table = np.frombuffer(mmap.mmap(-1, 3 * 8 * workers), dtype=np.int64).reshape(workers, 3)  # [W, 3]
    table[:, SAMPLE] = IDLE
    return table


def _cause_of_death(code: int) -> tuple[str, str]:
    """Describe how a process with this exit code ended, and what to do about it."""
    again = "; the same command goes on from the last checkpoint"
    if code >= 0:
        return f"ended with exit code {code}", "look at the messages above it, and at that sample" + again
    how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
    if -code == signal.SIGKILL:
        return how, "if the memory ran out (see dmesg), take fewer loader workers (data.workers) or more memory" + again
    if -code == signal.SIGBUS:
        return how, "if /dev/shm is full, enlarge it (docker run --shm-size) or take fewer loader workers" + again
    return how, "look at that sample; a decoder that crashes is worth a report" + again


def _describe_hang(table: np.ndarray, seconds: float, index: ShardIndex) -> UserError:
    rows = [row for row in table.tolist() if row[SAMPLE] != IDLE]
    if not rows:
        states = ", ".join(f"process {pid} {_state(pid)}" for pid in table[:_SAID, PID].tolist())
        return PeerError(
            f"no batch came for {seconds:.0f} s, though no loader worker is at a sample: {states}",
            "see what stopped them; the same command goes on from the last checkpoint",
        )
    said = "; ".join(
        f"process {row[PID]} {'waits for the shard of' if row[FETCHING] else 'is at'} {sample_name(index, row[SAMPLE])}"
        for row in rows[:_SAID]
    )
    more = f"; and {len(rows) - _SAID} more" if len(rows) > _SAID else ""
    return DataError(
        f"{len(rows)} of {len(table)} loader workers have not moved for {seconds:.0f} s: {said}{more}",
        "see to the disk, network drive or server that does not answer, and start again; data.timeout_seconds allows "
        "more, as far as engine.timeout_seconds does",
    )


def _state(pid: int) -> str:
    """Return the state of a process according to the kernel."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "is gone"
    return {"T": "is stopped", "t": "is being traced", "D": "waits for a disk", "Z": "has ended"}.get(letter, "waits")
