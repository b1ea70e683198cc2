"""The results of a benchmark: small tables for a person, and the same data as JSON for a program."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from maedistill.benchmark.timing import Spread

Row = dict[str, Any]  # column -> text, number or Spread; all rows of a table have the same columns


@dataclass
class Report:
    """Tables by title, and lines of text below them."""

    tables: dict[str, list[Row]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the whole report as text for a terminal."""
        parts = [f"{title}\n{_table(rows)}" for title, rows in self.tables.items()]
        return "\n\n".join([_machine_line(), *parts, *(["\n".join(self.remarks)] if self.remarks else [])])

    def write_json(self, path: Path, *, command: Sequence[str]) -> None:
        """Write everything in full precision, with command and machine; a Spread becomes median, low and high."""
        document = {"command": list(command), "machine": machine(), "tables": self.tables, "remarks": self.remarks}
        path.write_text(json.dumps(document, indent=1, default=vars) + "\n")


def machine() -> dict[str, Any]:
    """Describe the machine on which the figures were measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0))
    return {"cores": cores, "threads": torch.get_num_threads(), "gpu": gpu, "cpu": _cpu(), "torch": torch.__version__}


def _cpu() -> str:
    """Return the processor's name, or its architecture if the system does not give the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _machine_line() -> str:
    found = machine()
    return f"{found['cores']} cores of {found['cpu']}, {found['gpu'] or 'no GPU'}, torch {found['torch']}"


def _table(rows: Sequence[Row]) -> str:
    """Format rows as a table with columns as wide as their widest cell; numbers are right-aligned."""
    assert rows and all(row.keys() == rows[0].keys() for row in rows)
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    is_text = [isinstance(value, str) for value in rows[0].values()]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        )
        for line in cells
    )


def _cell(value: object) -> str:
    if isinstance(value, Spread | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
