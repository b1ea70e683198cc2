"""RUN/train.log: what rank 0 printed, start after start, each under a header; errors of the other ranks too.

    print -> _Copy of stdout or stderr -> Terminal or pipe
                                       -> TrainLog: lines wait until the folder is ours, then go to the file

A log that cannot be written never ends a run: its lines are lost, which is said once, and later lines are tried again.
Nor does a reader that has left.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from maedistill.errors import Preempted, UserError
from maedistill.escaping import shown, traceback_lines
from maedistill.processes import distributed
from maedistill.runs.terminal import Terminal, is_terminal, outlive_readers

_COLOUR = re.compile("\x1b\\[[0-9;]*m")


class TrainLog:
    """The log of a run folder. Nothing is written before `begin`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.terminal: Terminal | None = None  # during `capture`, on rank 0
        self._waiting: list[str] | None = []  # None: the log has begun
        self._lost = False

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Log what this process prints in the block, if it is rank 0, and the error that ends the block."""
        before = sys.stdout, sys.stderr
        outlive_readers()
        if distributed.is_main():
            self.terminal = Terminal(sys.stdout)
            sys.stdout, sys.stderr = (_Copy(stream, self, self.terminal) for stream in (sys.stdout, sys.stderr))
        try:
            yield
        except BaseException as error:
            self._note_end(error)
            raise
        finally:
            if self.terminal is not None:
                self.terminal.clear()
                self.terminal = None
            sys.stdout, sys.stderr = before

    def begin(self, *header: str) -> None:
        """Begin the log of a start: write the header and the lines that waited."""
        waiting, self._waiting = self._waiting or [], None
        self.add(*header, *waiting)

    def add(self, *lines: str) -> None:
        """Append lines."""
        if self._waiting is not None:
            self._waiting += lines
            return
        text = "".join(shown(_COLOUR.sub("", line.rpartition("\r")[2])) + "\n" for line in lines)
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                os.write(descriptor, text.encode(errors="replace"))
            finally:
                os.close(descriptor)
            self._lost = False
        except OSError as error:
            if not self._lost and sys.__stderr__ is not None:  # not sys.stderr, which would come back here
                with suppress(OSError, ValueError):
                    sys.__stderr__.write(shown(f"warning: {self.path} cannot be written ({error.strerror})") + "\n")
            self._lost = True

    def _note_end(self, error: BaseException) -> None:
        """Log the error that ends the run. It is printed only after the streams are those of before."""
        who = "" if distributed.is_main() else f"rank {distributed.rank()}: "
        if isinstance(error, UserError):
            self.add(f"{who}error: {error.cause}", f"  fix: {error.remedy}")
        elif not isinstance(error, Preempted | KeyboardInterrupt):
            self.add(*(f"{who}{line}" for line in traceback_lines(error)))
        elif distributed.is_main():
            self.add(*(str(error) or "stopped by Ctrl-C").splitlines())


class _Copy:
    """A text stream that also logs every whole line."""

    def __init__(self, stream: TextIO, log: TrainLog, terminal: Terminal) -> None:
        self._stream, self._log, self._terminal = stream, log, terminal
        self._wraps = is_terminal(stream)
        self._line = ""

    def write(self, text: str) -> int:
        """Write text; a terminal gets it line by line, except for progress bars, which rewrite theirs."""
        *lines, self._line = (self._line + text).split("\n")
        raw = not self._wraps or "\r" in text
        if raw:
            self._stream.write(text)
        for line in lines:
            if not raw:
                self._terminal.line(line, self._stream)
            self._log.add(line)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
