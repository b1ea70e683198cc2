"""Files that a run writes in addition to checkpoints. A full disk neither ends the run nor loses a line.

AppendOnlyFile      -> RUN/metrics.jsonl and other files that grow; lines that the disk refuses are kept and retried
write_text          -> a small file, whole also after a power cut
write_errors        -> a file that has to be written: the command ends with a DataError if it cannot be
ignore_write_errors -> an optional file, such as a picture, is left out with a warning if it cannot be written
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maedistill.durable import sync, write_durably
from maedistill.errors import DataError
from maedistill.escaping import warn


class AppendOnlyFile:
    """A text file that grows by whole lines. Lines that the disk refuses are kept and written later.

    unique: skip lines that the file already has, so that steps repeated after a restart leave no duplicates.
    """

    def __init__(self, path: Path, *, unique: bool = False) -> None:
        self.path = path
        self._known: set[str] | None = None
        if unique:
            self._known = set(path.read_text(errors="replace").splitlines()) if path.is_file() else set()
        self._waiting = b"\n" if unique and _ends_torn(path) else b""
        self._warned = False
        self._one_at_a_time = threading.Lock()  # the saver's thread also flushes

    def append(self, *lines: str) -> None:
        """Add lines, given without newline. If the disk refuses them, warn once until all are written."""
        if self._known is not None:
            lines = tuple(line for line in dict.fromkeys(lines) if line not in self._known)
            self._known.update(lines)
        with self._one_at_a_time:
            self._waiting += "".join(f"{line}\n" for line in lines).encode()
        try:
            self.flush()
        except OSError as error:
            if not self._warned:
                warn(f"{self.path} cannot be written ({error.strerror}); its lines are kept until there is space")
            self._warned = True

    def flush(self) -> None:
        """Write the pending lines. Raises OSError if the disk refuses them; what is left stays pending."""
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

    def sync(self) -> None:
        """Write the pending lines, so that no power cut costs one. Raises OSError if the disk refuses them."""
        self.flush()
        if self.path.exists():
            sync(self.path)
            sync(self.path.parent)

    def close(self) -> None:
        """Sync all lines. Raises DataError if that fails, because they would be lost."""
        with write_errors(self.path):
            self.sync()


@contextmanager
def ignore_write_errors(path: Path) -> Iterator[None]:
    """Wrap the writing of an optional file, whose folder is made: on OSError, remove the file and warn."""
    with suppress(OSError):  # then what is written fails as well
        path.parent.mkdir(exist_ok=True)
    try:
        yield
    except OSError as error:
        warn(f"{path} is left out: it cannot be written ({error.strerror})")
        if path.is_file():
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a small file durably. Raises DataError if the disk refuses it."""
    with write_errors(path):
        write_durably(path, text.encode())


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of writing a file or a folder into a DataError that names it."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror})",
            "free disk space or correct the permissions there, then start the same command again",
        ) from error


def _ends_torn(path: Path) -> bool:
    """Return whether the last line of a file was cut, so that the next one would become a part of it."""
    return path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
