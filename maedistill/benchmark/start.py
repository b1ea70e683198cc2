"""The time from the command to the end of the first step: real starts of the tool, split into parts.

    python tools/pretrain.py CONFIG ... under `stopwatch.py`, in a temporary run folder -> seconds by part

The first start is reported separately: it may read a cold disk, scan shards without an index, compile, or download a
teacher.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from maedistill.benchmark.report import Report, Row
from maedistill.benchmark.stopwatch import IMPORT, STEP
from maedistill.benchmark.timing import spread
from maedistill.config.loader import load_config
from maedistill.errors import DataError, Preempted

_TOOL = Path(__file__).resolve().parents[2] / "tools" / "pretrain.py"
_PACKAGES = 5  # number of packages with a row of their own; the others share one row

Seconds = dict[str, float]  # by part, see stopwatch.py


def measure_start(config: str, overrides: Sequence[str] = (), *, rounds: int) -> Report:
    """Start pre-training 1 + `rounds` times and stop each start after its first step.

    Raises the errors of loading the config, and DataError if a start ends before its first step.
    """
    with tempfile.TemporaryDirectory(prefix="maedistill-start-") as folder:
        command = [config, *overrides, f"run={folder}/run"]
        load_config(config, command[1:])
        first, *later = [_start(command, Path(folder) / f"{number}.json") for number in range(1 + rounds)]
    return start_report(first, later)


def start_report(first: Seconds, later: Sequence[Seconds]) -> Report:
    """Build a table of the later starts by part, and one of their imports by package."""
    names = list(dict.fromkeys(name for seconds in later for name in seconds))
    names.sort(key=lambda name: name == STEP)  # the first step goes last: it surrounds parts that are named before it
    packages = [name for name in names if name.startswith(IMPORT)]
    packages.sort(key=lambda name: -_median([seconds.get(name, 0.0) for seconds in later]))
    parts = {name: [name] for name in names if name not in packages}
    report = Report()
    report.tables[f"from the command to the first step, {len(later)} starts"] = _rows(
        {"imports": packages, **parts, "all": names}, later
    )
    named = {name.removeprefix(IMPORT): [name] for name in packages[:_PACKAGES]}
    report.tables["imports by package, each without what it imports of others"] = _rows(
        {**named, "others": packages[_PACKAGES:], "all": packages}, later
    )
    report.remarks.append(f"the first start, which may have found cold caches, took {sum(first.values()):.1f} s")
    return report


def _start(command: Sequence[str], file: Path) -> Seconds:
    """Start the tool once in a separate process; return its seconds by part."""
    stopwatch = [sys.executable, "-m", "maedistill.benchmark.stopwatch"]
    started = subprocess.run(
        [*stopwatch, repr(time.monotonic()), str(file), str(_TOOL), *command], capture_output=True, text=True
    )
    if started.returncode != Preempted.exit_code or not file.exists():
        sys.stderr.write(started.stderr)
        raise DataError(
            f"the tool ended before its first step, with exit code {started.returncode}",
            "its own message is above; the same config must run with tools/pretrain.py",
        )
    return json.loads(file.read_text())


def _rows(groups: dict[str, list[str]], starts: Sequence[Seconds]) -> list[Row]:
    """Return the seconds of each group of parts, and its share of the last group."""
    sums = {group: [sum(s.get(name, 0.0) for name in names) for s in starts] for group, names in groups.items()}
    whole = list(sums.values())[-1]
    return [
        {
            "part": group,
            "seconds": spread(tuple(seconds)),
            "share": f"{_median([one / all_ for one, all_ in zip(seconds, whole, strict=True)]):.0%}",
        }
        for group, seconds in sums.items()
    ]


def _median(values: Sequence[float]) -> float:
    return spread(tuple(values)).median
