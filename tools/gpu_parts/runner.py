"""Run parts in separate processes, each killed at its time bound, so that one that hangs or crashes affects no other.

    parts, in order -> processes -> OUT/rows.jsonl, OUT/logs.txt -> PartEnd

Parts that only check correctness may run at the same time if there are enough cores; timed parts run alone.
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
LEAST = 15  # seconds: with less time left, no part is started
LOGS = "logs.txt"  # the logs of all parts that have ended
_LONGEST_LOG = 300_000  # characters of one log that are kept, its last ones
_PAUSE = 0.1


@dataclass(frozen=True)
class Part:
    """A module with a function `run(check)`, its time bound in seconds, and its purpose.

    together: it may run beside other parts with this flag.
    """

    name: str
    module: str
    seconds: float
    about: str
    together: bool = False


@dataclass(frozen=True)
class Settings:
    """Settings of all parts. until: end in seconds since the epoch; jobs: number of parts that may run at a time."""

    tiny: bool
    out: Path
    work: Path
    until: float
    jobs: int
    environment: dict[str, str]


@dataclass(frozen=True)
class Child:
    """The arguments of a part's process, passed on its command line. parent: process id of the tool."""

    part: str
    module: str
    tiny: bool
    out: str
    work: str
    until: float
    parent: int


@dataclass
class Started:
    """A running part. since, until: start and latest end in seconds since the epoch."""

    part: Part
    process: subprocess.Popen
    since: float
    until: float


@dataclass(frozen=True)
class PartEnd:
    """The end of a part. code: its exit code, negative for a signal; None if it was killed or never started."""

    name: str
    seconds: float
    code: int | None


def run_parts(
    parts: Sequence[Part], settings: Settings, ends: list[PartEnd], *, progress: Callable[[list[Row]], None]
) -> None:
    """Run all parts that the time allows.

    How each ended is appended to `ends`, also if an exception stops the parts. progress: called with new rows.
    """
    rows, waiting, running = RowFile(settings.out / "rows.jsonl"), list(parts), []
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
            if new := rows.new():
                progress(new)
            time.sleep(_PAUSE)
    finally:
        for started in running:
            _kill(started.process)
            collect_logs(started.part, settings)
            seconds = time.time() - started.since
            rows.append(Row(started.part.name, "the rest of it", SKIPPED, f"stopped after {seconds:.0f} s"))
            ends.append(PartEnd(started.part.name, seconds, None))
        ends += [PartEnd(part.name, 0.0, None) for part in waiting]


def log_folder(work: Path, part: str) -> Path:
    """Return the folder of a part's logs."""
    return work / "logs" / part


def collect_logs(part: Part, settings: Settings) -> None:
    """Append the logs of a part that has ended to the one file of the results."""
    with (settings.out / LOGS).open("a") as file:
        for log in sorted(log_folder(settings.work, part.name).iterdir()):
            file.write(f"==== {part.name}: {log.name}\n{log.read_text(errors='replace')[-_LONGEST_LOG:]}\n")


def bound(part: Part, settings: Settings) -> float:
    """Return the seconds that a part may take: three times as many with --tiny, for small, shared machines."""
    return part.seconds * (3 if settings.tiny else 1)


def _may_start(part: Part, running: Sequence[Started], settings: Settings) -> bool:
    """Return whether a part may start beside the running ones. With --tiny any part may, as figures have no meaning."""
    if not running:
        return True
    parts = [part, *(started.part for started in running)]
    return len(running) < settings.jobs and (settings.tiny or all(one.together for one in parts))


def _start(part: Part, settings: Settings) -> Started:
    """Start a part as the leader of a process group, to which all its child processes belong."""
    now = time.time()
    until = min(now + bound(part, settings), settings.until)
    told = Child(part.name, part.module, settings.tiny, str(settings.out), str(settings.work), until, os.getpid())
    log_folder(settings.work, part.name).mkdir(parents=True)
    with _log(part, settings).open("w") as log:
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
    """Return how a part ended, and record a row if it failed; return None while it runs within its bound."""
    part, seconds, code = started.part, time.time() - started.since, started.process.poll()
    if code is None and time.time() < started.until:
        return None
    _kill(started.process)  # including child processes that are still running
    collect_logs(part, settings)
    if code is None and seconds < bound(part, settings):
        rows.append(Row(part.name, "the rest of it", SKIPPED, f"the time was up after {seconds:.0f} s"))
    elif code is None:
        rows.append(Row(part.name, "ends in time", FAIL, f"killed at its bound of {seconds:.0f} s; see {LOGS}"))
    elif code:
        rows.append(Row(part.name, "ends well", FAIL, f"exit code {code}: {_last_line(part, settings)}; see {LOGS}"))
    return PartEnd(part.name, seconds, code)


def _kill(process: subprocess.Popen) -> None:
    """Kill a part's whole process group."""
    with suppress(ProcessLookupError):  # no process is left in it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _log(part: Part, settings: Settings) -> Path:
    """Return the file of what a part prints."""
    return log_folder(settings.work, part.name) / "output.log"


def _last_line(part: Part, settings: Settings) -> str:
    """Return the last non-empty line of a part's output, which is the error if it ends with a traceback."""
    lines = [line.strip() for line in _log(part, settings).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
