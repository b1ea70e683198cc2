"""Runs parts, each in a process of its own that is killed at its bound: what hangs or crashes takes nothing else along.

    parts, in order -> processes -> rows.jsonl, logs/PART.log -> PartEnd

Parts that only say what is right may run at the same time where there are cores enough; what is timed runs alone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_parts.rows import FAIL, SKIPPED, Row, RowFile

TOOL = Path(__file__).resolve().parent.parent / "gpu_check.py"
LEAST = 15  # seconds: with less left, no part is begun
_PAUSE = 0.1


@dataclass(frozen=True)
class Part:
    """A module with a function `run(check)`, its bound in seconds, and what it is for.

    together: it may run beside others of its kind.
    """

    name: str
    module: str
    seconds: float
    about: str
    together: bool = False


@dataclass(frozen=True)
class Settings:
    """Of all parts. until: seconds since the epoch; jobs: how many parts may run at the same time."""

    tiny: bool
    out: Path
    work: Path
    until: float
    jobs: int
    environment: dict[str, str]


@dataclass(frozen=True)
class Child:
    """What the process of a part is told, on its command line."""

    part: str
    module: str
    tiny: bool
    out: str
    work: str
    until: float


@dataclass
class Started:
    """A part that runs."""

    part: Part
    process: subprocess.Popen
    since: float
    until: float


@dataclass(frozen=True)
class PartEnd:
    """How a part ended. code: its exit code, negative for a signal; None where it was killed or never begun."""

    name: str
    seconds: float
    code: int | None


def run_parts(parts: Sequence[Part], settings: Settings, *, show: Callable[[Row], None]) -> list[PartEnd]:
    """Run all parts that the time allows; `show` gets each row as it comes."""
    rows, waiting, running, ends = RowFile(settings.out / "rows.jsonl"), list(parts), [], []
    try:
        while waiting or running:
            while waiting and _may_start(waiting[0], running, settings):
                part = waiting.pop(0)
                if settings.until - time.time() < LEAST:
                    rows.append(Row(part.name, "all of it", SKIPPED, "no time was left"))
                    ends.append(PartEnd(part.name, 0.0, None))
                    continue
                running.append(_start(part, settings))
            for started in list(running):
                if (end := _end(started, settings, rows)) is not None:
                    running.remove(started)
                    ends.append(end)
            for row in rows.new():
                show(row)
            time.sleep(_PAUSE)
    finally:
        for started in running:
            _kill(started.process)
    return ends


def bound(part: Part, settings: Settings) -> float:
    """Return the seconds that a part may take: with --tiny more, for small machines that others use, too."""
    return part.seconds * (3 if settings.tiny else 1)


def _may_start(part: Part, running: Sequence[Started], settings: Settings) -> bool:
    """Say whether a part may begin beside those that run. With --tiny no figure means anything, and any part may."""
    if not running:
        return True
    parts = [part, *(started.part for started in running)]
    return len(running) < settings.jobs and (settings.tiny or all(one.together for one in parts))


def _start(part: Part, settings: Settings) -> Started:
    """Begin a part. It leads a process group, to which all that it starts belongs."""
    now = time.time()
    until = min(now + bound(part, settings), settings.until)
    told = Child(part.name, part.module, settings.tiny, str(settings.out), str(settings.work), until)
    with (settings.out / "logs" / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(TOOL), "--child", json.dumps(asdict(told))],
            cwd=TOOL.parent.parent,
            env=settings.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Started(part, process, now, until)


def _end(started: Started, settings: Settings, rows: RowFile) -> PartEnd | None:
    """Say how a part ended, and note it where it went wrong; None while it runs within its bound."""
    part, seconds, code = started.part, time.time() - started.since, started.process.poll()
    if code is None and time.time() < started.until:
        return None
    _kill(started.process)  # with what it may have left behind
    log = settings.out / "logs" / f"{part.name}.log"
    if code is None and seconds < bound(part, settings):
        rows.append(Row(part.name, "the rest of it", SKIPPED, f"the time was up after {seconds:.0f} s"))
    elif code is None:
        rows.append(Row(part.name, "ends in time", FAIL, f"killed at its bound of {seconds:.0f} s; see {log}"))
    elif code:
        rows.append(Row(part.name, "ends well", FAIL, f"exit code {code}: {_last_line(log)}; see {log}"))
    return PartEnd(part.name, seconds, code)


def _kill(process: subprocess.Popen) -> None:
    """End a part's whole process group."""
    with suppress(ProcessLookupError):  # nobody is left in it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    """Return the last line that says something: of a traceback, the error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
