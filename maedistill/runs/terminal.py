"""What a person at a terminal sees of a run: one rewritten status line, and lines that wrap between words.

A pipe or a file gets every line as it is, and no status. Neither ends a run when it ends itself.
"""

import os
import shutil
import sys
import textwrap
from contextlib import suppress
from typing import Any, TextIO

from maedistill.escaping import shown

_ERASE = "\r\x1b[K"
_INDENT = 9  # columns, as wide as the keys of the summary


class Terminal:
    """Writes whole lines to streams, and a status line below the last one if stdout is a terminal."""

    def __init__(self, stdout: TextIO) -> None:
        self._stdout = stdout
        self.shows_status = is_terminal(stdout)
        self._status = ""

    def status(self, text: str) -> None:
        """Replace the status line, cut to the width of the terminal."""
        if self.shows_status:
            self._status = shown(text)[: _columns() - 1]
            self._stdout.write(f"{_ERASE}{self._status}")
            self._stdout.flush()

    def line(self, text: str, stream: TextIO) -> None:
        """Write a line in place of the status line, wrapped to the width of the terminal."""
        self.clear()
        stream.write("\n".join(wrapped(text, _columns())) + "\n")

    def clear(self) -> None:
        """Remove the status line."""
        if self._status:
            self._status = ""
            self._stdout.write(_ERASE)
            self._stdout.flush()


class LastingStream:
    """A text stream that drops what cannot be written: the reader of a pipe has left, or the disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand over what was written."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """Let this program continue when its output is no longer read, as after `| head`."""
    sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that can rewrite a line."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def wrapped(text: str, width: int) -> list[str]:
    """Break a line between its fields, which two spaces separate; a longer field between words, never within one."""
    if len(text) <= width:
        return [text]
    indent, lines = " " * _INDENT, [""]
    for field in text.split("  "):
        joined = f"{lines[-1]}  {field}" if lines[-1].strip() else lines[-1] + field
        if len(joined) <= width or not lines[-1].strip():
            lines[-1] = joined
        else:
            lines.append(indent + field.strip())
    pieces = [
        textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        for line in lines
    ]
    return [piece for line in pieces for piece in line]


def _columns() -> int:
    return max(20, shutil.get_terminal_size().columns)
