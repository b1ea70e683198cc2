"""What a run writes beside its checkpoints, on a disk that may be full for a while: that ends no run and loses no line.

Lines.append -> RUN/metrics.jsonl and other files that grow; what the disk does not take waits for the next time
spared       -> a picture that cannot be written is left out, with a warning
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maedistill.errors import DataError


class AppendOnlyFile:
    """A text file that grows by whole lines. Lines that the disk refuses are kept and written when it takes them.

    unique: a line that the file has already is not added, so that work which a restart repeats leaves no second trace.
    """

    def __init__(self, path: Path, *, unique: bool = False) -> None:
        self.path = path
        self._known: set[str] | None = None
        if unique:
            self._known = set(path.read_text(errors="replace").splitlines()) if path.is_file() else set()
        self._waiting = b""
        self._warned = False
        self._one_at_a_time = threading.Lock()  # the saver's thread flushes, too

    def append(self, *lines: str) -> None:
        """Adds lines, each without its end. A disk that refuses them is a warning, once until it has taken all."""
        if self._known is not None:
            lines = tuple(line for line in dict.fromkeys(lines) if line not in self._known)
            self._known.update(lines)
        self._waiting += "".join(f"{line}\n" for line in lines).encode()
        try:
            self.flush()
        except OSError as error:
            if not self._warned:
                warn(f"{self.path} cannot be written ({error.strerror}); its lines wait for room")
            self._warned = True

    def flush(self) -> None:
        """Writes what waits. Raises OSError, and keeps what is left, where the disk does not take it."""
        with self._one_at_a_time:
            if not self._waiting:
                return
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                while self._waiting:
                    self._waiting = self._waiting[os.write(descriptor, self._waiting) :]
            finally:
                os.close(descriptor)
            self._warned = False

    def close(self) -> None:
        """Writes what waits. Raises DataError where that cannot be done: nobody would write it later."""
        try:
            self.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error


@contextmanager
def ignore_write_errors(path: Path) -> Iterator[None]:
    """Around the writing of a file that a run can do without: where that fails, there is none, and a warning."""
    try:
        yield
    except OSError as error:
        warn(f"{path} is left out: it cannot be written ({error.strerror})")
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all. Raises DataError where the disk does not take it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> DataError:
    """A file that the disk does not take, said to the person who can mend it."""
    return DataError(
        f"{path} cannot be written ({error.strerror})",
        "make room or mend the permissions there, then start the same command again",
    )


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
