"""Asynchronous checkpoints: training waits for the copies to CPU memory, but not for the disk.

    save(step 100): wait for the write of step 50, copy everything to rank 0's CPU, hand it to a thread, return
    training ...                                                        the thread writes, syncs, renames, prunes
    save(step 150): wait for the write of step 100 and check its result, ...

There is one write at a time, so at most one set of copies in memory; a disk that is slower than the saves delays them.
The thread touches only its copies and files. All collectives are in the calls of the main thread, where every rank
learns how the previous write ended.

Loader workers may be forked in the middle of a write. A forked process does not have this thread, so it writes nothing.
It inherits an open file or two and the pages of the copies, and releases both when it ends. It flushes nothing, since
workers exit through os._exit. It needs no lock that the thread may hold: the thread runs no torch kernel and imports
nothing, and libc resets the lock of malloc at a fork.
"""

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import nn

from maedistill.errors import DataError
from maedistill.escaping import say, warn
from maedistill.processes.distributed import on_main
from maedistill.runs.checkpoint import WRITE_ERRORS, Snapshot, latest_step, take_snapshot, write_snapshot
from maedistill.runs.records import AppendOnlyFile
from maedistill.training.engine import Engine

_MAX_FAILURES = 3  # in a row, before the run ends
_PATIENCE = 60  # seconds that a failed run waits for the current write


class Saver:
    """Writes the checkpoints of a run. `with saver:` ends with `close`, but after an error without collectives.

    keep: see `write_snapshot`. texts: small files that every checkpoint gets, by name. If a write fails for lack of
    space or permission, the saver warns and training goes on, even before the first checkpoint: stopping would lose all
    progress. Three failures in a row end the run, and so does an error that no later save can repair.
    """

    def __init__(self, folder: Path, *, keep: int, texts: Mapping[str, str] | None = None) -> None:
        self.folder, self.keep, self.texts = folder, keep, texts or {}
        self.failures: list[DataError] = []  # in a row, on rank 0
        self._writing: _Writing | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._writing is not None:  # no collectives: the other ranks may be gone
            self.wait()
            if self._writing.is_alive():
                warn(f"step {self._writing.step} is still being written: given up")
            else:
                self._conclude(_MAX_FAILURES + 1)

    def save(
        self,
        *,
        step: int,
        engine: Engine,
        state: dict[str, Any],
        extra_networks: Mapping[str, nn.Module] | None = None,
        records: Sequence[AppendOnlyFile] = (),
    ) -> None:
        """Take the checkpoint of `step` and start writing it, once the previous one is written. Collective.

        state, extra_networks: see `take_snapshot`. records: the run's log files; rank 0 syncs their lines before the
        checkpoint that stands for them; if that fails there is no checkpoint. Raises what `finish_write` raises.
        """
        self.finish_write()
        snapshot = take_snapshot(step=step, engine=engine, state=state, extra_networks=extra_networks, texts=self.texts)
        if snapshot is not None:
            self._writing = _Writing(partial(self._write, snapshot, records), step)

    def _write(self, snapshot: Snapshot, records: Sequence[AppendOnlyFile]) -> None:
        """Sync the records and write the checkpoint, in the thread."""
        for lines in records:
            lines.sync()
        write_snapshot(self.folder, snapshot, keep=self.keep)

    def wait(self) -> None:
        """Wait for the current write, as long as a failed run does. Any thread may call it."""
        if (writing := self._writing) is not None:
            writing.join(_PATIENCE)

    def finish_write(self) -> None:
        """Finish the current write. Collective. Raises DataError on every rank after too many failures in a row."""
        on_main(partial(self._conclude, _MAX_FAILURES))

    def close(self) -> None:
        """Finish the last write: `finish_write`, but raise DataError on every rank if that write failed. Collective."""
        on_main(partial(self._conclude, 1))

    def _conclude(self, most: int) -> None:
        """Do rank 0's part of `finish_write`, without collectives. Raises what the user cannot mend as it is."""
        error = None
        if (writing := self._writing) is not None:
            writing.join()
            self._writing, error = None, writing.error
            if error is None:
                self.failures = []
            elif isinstance(error, WRITE_ERRORS):
                last = latest_step(self.folder)
                previous = "there is none before it" if last is None else f"that of step {last} is intact"
                cause = f"saving the checkpoint of step {writing.step} in {self.folder} failed ({error}); {previous}"
                remedy = "free disk space or correct the permissions there; the same command continues the run"
                self.failures.append(DataError(cause, remedy))
            else:
                raise error
        if len(self.failures) >= most:
            raise self.failures[-1]
        if error is not None:
            problem = self.failures[-1]
            say(f"warning: {problem.cause}", f"  fix: {problem.remedy}", error=True)


class _Writing(threading.Thread):
    """A thread that writes one checkpoint. It is a daemon, so that a hung disk does not keep the process alive."""

    def __init__(self, write: partial[None], step: int) -> None:
        super().__init__(target=write, name=f"checkpoint of step {step}", daemon=True)
        self.step = step
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Write the checkpoint, release the copies, and keep an error for the main thread."""
        try:
            super().run()
        except Exception as error:
            self.error = error
