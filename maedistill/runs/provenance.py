"""The record of one start, for run.json and the header of train.log: command, place, versions, source, hardware."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import maedistill
from maedistill.escaping import masked
from maedistill.machine import JOBS_VARIABLE

_PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "webdataset", "numpy")
_GIT_SECONDS = 10


def describe_start(execution: dict[str, Any]) -> dict[str, Any]:
    """Return the record of this start. execution: what it runs on, from `start_run`."""
    versions = {"python": platform.python_version(), "maedistill": maedistill.__version__}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": masked(shlex.join(sys.argv)),
        "host": platform.node(),
        "job": job(),
        "versions": versions | {name: version(name) for name in _PACKAGES},
        "source": git_state(Path(maedistill.__file__).parent),
        **execution,
    }


def job() -> str | None:
    """Return what SLURM or torchrun calls this job, the same for all its restarts; None without them."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")


def is_begun_by_program() -> bool:
    """Return whether SLURM, torchrun or a study has started this process: they, or who reads them, need exit.json."""
    return job() is not None or JOBS_VARIABLE in os.environ


def is_restart() -> bool:
    """Return whether torchrun or SLURM has started the same command before."""
    return any(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def header_lines(start: dict[str, Any]) -> list[str]:
    """Describe a start in three lines of train.log."""
    versions = [f"{name} {number}" for name, number in {**start["versions"], "maedistill": version_of(start)}.items()]
    names = ("device", "precision", "ranks", "hosts", "threads")
    return [
        f"=== {start['time']}  {start['command']}",
        f"host     {start['host']}: " + ", ".join(f"{name} {start[name]}" for name in names if name in start),
        f"versions {', '.join(versions)}",
    ]


def version_of(start: dict[str, Any]) -> str:
    """Return the version and the commit that a start ran: `0.1.0 (dc531fb495e2, with local changes)`."""
    source, number = start.get("source"), str(start["versions"]["maedistill"])
    if source is None:
        return number
    return f"{number} ({source['commit'][:12]}{', with local changes' if source['dirty'] else ''})"


def git_state(package: Path) -> dict[str, Any] | None:
    """Return the commit of the checkout that has this package, and whether its files differ from it, else None.

    A package that is installed into a folder of another checkout is not of that checkout.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or one of another user
        return None
