"""Rows: the results of a part, one line of JSON each, written as soon as they are known."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

OK, FAIL, MEASURED, SKIPPED = "ok", "FAIL", "measured", "skipped"


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
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
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


def table(rows: Sequence[Row]) -> str:
    """Format rows in columns for a terminal."""
    cells = [("part", "check", "verdict", "figure", "goal")]
    cells += [(row.part, row.check, row.verdict, row.figure, row.goal) for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(3)]
    lines = []
    for *first, figure, goal in cells:
        head = "  ".join(cell.ljust(width) for cell, width in zip(first, widths, strict=True))
        lines.append(f"{head}  {figure}{f'  [{goal}]' if goal else ''}".rstrip())
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """Format rows as a Markdown table."""
    lines = ["| part | check | verdict | figure | goal |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row.part, row.check, row.verdict, row.figure, row.goal)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
