"""Rows: the results of a part, one line of JSON each, written as soon as they are known."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

OK, FAIL, MEASURED, SKIPPED = "ok", "FAIL", "measured", "skipped"
_LONGEST_LINE = 240  # characters of a row in the digest


@dataclass(frozen=True)
class Row:
    """One check: its verdict, the figure as text, and the same values as numbers for a program.

    goal: the goal of the figure and whether it is met; empty if there is no goal.
    """

    part: str
    check: str
    verdict: str
    figure: str = ""
    goal: str = ""
    values: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        beside = f"  [{self.goal}]" if self.goal else ""
        return f"{self.verdict:<8}  {self.part}: {self.check}: {self.figure}{beside}"


class RowFile:
    """Rows of several processes in one file. Rows of a killed process are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0  # bytes that `new` has returned

    def append(self, row: Row) -> None:
        """Write a row by a single call, so that rows of two processes never mix."""
        line = (json.dumps(asdict(row)) + "\n").encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, line)
        finally:
            os.close(file)

    def new(self) -> list[Row]:
        """Return the rows since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        self._read += len(whole) + 1 if whole else 0
        return [Row(**json.loads(line)) for line in whole.splitlines()]

    def all(self) -> list[Row]:
        """Return all rows."""
        return RowFile(self.path).new()


def digest(rows: Sequence[Row], *, most: int = 8000) -> str:
    """Format rows for a reader who sees only the last lines: what matters most comes last, failures at the very end.

    rows: of parts in order of importance. Checks that passed are counted. most: characters; what is left out is said.
    """
    lines = list[str]()
    for part in reversed(dict.fromkeys(row.part for row in rows)):
        mine = [row for row in rows if row.part == part]
        lines += [_shortened(row) for row in mine if row.verdict in (MEASURED, SKIPPED)]
        if passed := sum(row.verdict == OK for row in mine):
            lines.append(f"{OK:<8}  {part}: {passed} checks")
    lines += [_shortened(row) for row in reversed(rows) if row.verdict == FAIL]
    shown = len(lines)
    while shown and sum(len(line) + 1 for line in lines[-shown:]) > most:
        shown -= 1
    left = [f"... {len(lines) - shown} lines more: see summary.md"] if shown < len(lines) else []
    return "\n".join([*left, *lines[len(lines) - shown :]])


def _shortened(row: Row) -> str:
    """Return a row's line, without its middle if it is long: an error says at its end what it is."""
    text, half = str(row), _LONGEST_LINE // 2
    return text if len(text) <= _LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"


def markdown(rows: Sequence[Row]) -> str:
    """Format rows as a Markdown table."""
    lines = ["| part | check | verdict | figure | goal |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row.part, row.check, row.verdict, row.figure, row.goal)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
