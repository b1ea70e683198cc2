"""A progress bar that is drawn on a terminal only. In a pipe it prints a line, at most every 10 seconds."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

_PIPE_SECONDS = 10.0
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}, {remaining} left"


class ProgressBar(tqdm):
    """tqdm's bar, which in a pipe would write thousands of copies of itself into one line of a log."""

    def __init__(self, *args: Any, file: TextIO | None = None, **options: Any) -> None:
        stream = file or sys.stderr
        if not stream.isatty():  # delay: nothing at all for what takes less
            options |= {"mininterval": _PIPE_SECONDS, "maxinterval": _PIPE_SECONDS, "delay": _PIPE_SECONDS}
            options["bar_format"] = _LINE
        super().__init__(*args, file=stream, **options)

    @staticmethod
    def status_printer(file: TextIO) -> Any:
        """Return the function that shows the bar's text."""
        if file.isatty():
            return tqdm.status_printer(file)

        def print_line(text: str) -> None:
            file.write(f"{text.strip()}\n" if text.strip() else "")
            file.flush()

        return print_line
