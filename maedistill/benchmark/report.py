"""The results of a benchmark: small tables for a person, and the same data as JSON for a program."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maedistill.benchmark.timing import Spread
from maedistill.escaping import masked
from maedistill.machine import cpu_name
from maedistill.runs.records import write_text

Row = dict[str, Any]  # column -> text, number or Spread; all rows of a table have the same columns


@dataclass(frozen=True)
class Report:
    """Tables by title, and lines of text below them."""

    tables: dict[str, list[Row]]
    remarks: list[str]

    def lines(self) -> list[str]:
        """Return the whole report for a terminal."""
        here = describe_machine()
        head = f"{here['cores']} cores of {here['cpu']}, {here['gpu'] or 'no GPU'}, torch {here['torch']}"
        tables = [line for title, rows in self.tables.items() for line in (title, *_format(rows), "")]
        return [head, "", *tables, *self.remarks]

    def write_json(self, path: Path, *, command: Sequence[str]) -> None:
        """Write everything in full precision, with command and machine; a Spread becomes median, low and high."""
        document = {"command": [masked(word) for word in command], "machine": describe_machine(), **vars(self)}
        write_text(path, json.dumps(document, indent=1, default=vars) + "\n")


def describe_machine() -> dict[str, Any]:
    """Describe the machine on which the figures were measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores, threads, cpu = len(os.sched_getaffinity(0)), torch.get_num_threads(), cpu_name() or platform.machine()
    return {"cores": cores, "threads": threads, "gpu": gpu, "cpu": cpu, "torch": torch.__version__}


def _format(rows: Sequence[Row]) -> list[str]:
    """Format rows as a table with columns as wide as their widest cell; numbers are right-aligned."""
    assert rows and all(row.keys() == rows[0].keys() for row in rows)
    columns = []
    for name, first in rows[0].items():
        cells = [name, *(_cell(row[name]) for row in rows)]
        width = max(map(len, cells))
        columns.append([cell.ljust(width) if isinstance(first, str) else cell.rjust(width) for cell in cells])
    return ["  ".join(line) for line in zip(*columns, strict=True)]


def _cell(value: object) -> str:
    if isinstance(value, Spread | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
