"""When checkpoints are written: behind the training, which waits for the copies and not for the disk.

    save(step 100): wait for the write of step 50, copy everything to rank 0's CPU, hand it to a thread, return
    training ...                                                        the thread writes, syncs, renames, prunes
    save(step 150): hear how step 100 ended, ...

One write at a time, so at most one set of copies in memory; a disk that is slower than the saves slows them down. The
thread touches nothing but its copies and files: all collectives are in the calls of the main thread, where every rank
hears how the write before ended.

Loader workers may be forked in the middle of a write. A forked process has no such thread, so nothing is written there.
What it inherits is an open file or two and the pages of the copies, both given back when it ends; nothing of them is
flushed, since workers leave through os._exit. It needs no lock that the thread may hold: the thread runs no torch
kernel, imports nothing, and the locks of malloc and logging are made whole at a fork by libc and Python.
"""

import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from timm.utils import ModelEmaV3

from maedistill.errors import DataError
from maedistill.processes.ranks import on_main
from maedistill.runs.checkpoint import WRITE_ERRORS, Snapshot, save_error, take_snapshot, write_snapshot
from maedistill.runs.records import AppendOnlyFile
from maedistill.training.engine import Engine

_PATIENCE = 60  # seconds that a run which has failed waits for a disk


class Saver:
    """Writes the checkpoints of a run. `with saver:` ends with `close`, and after an error without collectives.

    keep, keep_every: see `write_snapshot`. A write that fails for want of room or permission is a warning, and training
    goes on, also where no checkpoint stands yet: stopping would lose all that is there. `most_failures` in a row end
    the run, and so does one that no later save can make good.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: float | None = None, max_failures: int = 3) -> None:
        self.folder, self.keep, self.keep_every, self.max_failures = folder, keep, keep_every, max_failures
        self.failures = 0  # in a row; rank 0 counts
        self._problem: DataError | None = None  # the last of them
        self._writing: _Writing | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._writing is not None:  # the other ranks may be gone
            self._writing.join(_PATIENCE)
            if self._writing.is_alive():
                print(f"warning: step {self._writing.step} is still being written: given up", file=sys.stderr)
            else:
                self._conclude(self.max_failures + 1)

    def save(
        self,
        *,
        step: int,
        engine: Engine,
        state: dict[str, Any],
        ema: ModelEmaV3 | None = None,
        records: Sequence[AppendOnlyFile] = (),
    ) -> None:
        """Collective. Takes the checkpoint of `step` and begins to write it, once the one before is written.

        state: plain JSON types, handed back by `load_latest`. records: what the run has said up to this step; on rank 0
        it is on the disk before the checkpoint is, or there is no checkpoint. Raises what `settle` raises.
        """
        self.settle()
        snapshot = take_snapshot(step=step, engine=engine, state=state, ema=ema)
        if snapshot is not None:
            self._writing = _Writing(partial(self._write, snapshot, records), step)

    def _write(self, snapshot: Snapshot, records: Sequence[AppendOnlyFile]) -> None:
        """What the thread does."""
        for lines in records:
            lines.flush()
        write_snapshot(self.folder, snapshot, keep=self.keep, keep_every=self.keep_every)

    def settle(self) -> None:
        """Collective. Waits for the write under way; DataError on every rank when it was one failure too many."""
        on_main(partial(self._conclude, self.max_failures))

    def close(self) -> None:
        """Collective. The end of the run: `settle`, and DataError on every rank when the last write failed."""
        on_main(partial(self._conclude, 1))

    def _conclude(self, most: int) -> None:
        """Rank 0's part of `settle`: no collectives. An error of the thread that nobody can mend is raised as it is."""
        writing = self._writing
        if writing is not None:
            writing.join()
            self._writing = None
            self._count(writing)
        if self.failures >= most:
            raise self._problem
        if writing is not None and writing.error is not None:
            print(f"warning: {self._problem.cause}\n  fix: {self._problem.remedy}", file=sys.stderr, flush=True)

    def _count(self, writing: "_Writing") -> None:
        if writing.error is None:
            self.failures, self._problem = 0, None
        elif isinstance(writing.error, WRITE_ERRORS):
            self.failures += 1
            self._problem = save_error(self.folder, writing.step, writing.error)
        else:
            raise writing.error


class _Writing(threading.Thread):
    """One checkpoint on its way to the disk. A daemon, so that a dead disk does not keep a dead process alive."""

    def __init__(self, write: partial[None], step: int) -> None:
        super().__init__(target=write, name=f"checkpoint of step {step}", daemon=True)
        self.step = step
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Writes, lets go of the copies, and keeps an error for the main thread."""
        try:
            super().run()
        except Exception as error:
            self.error = error
