"""The environment in which the figures were measured: card, driver, versions, date, cores."""

import importlib.metadata
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch


def head() -> dict[str, str]:
    """Return a description of this machine as text by name."""
    versions = {name: _version(name) for name in ("deepspeed", "timm", "triton")}
    return {
        "card": card(),
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version() or "none"),
        **versions,
        "python": ".".join(map(str, os.sys.version_info[:3])),
        "cores": str(len(os.sched_getaffinity(0))),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
    }


def card() -> str:
    """Return the name of the card and its memory, or "none"."""
    if not torch.cuda.is_available():
        return "none"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _driver() -> str:
    """Return the driver's version, or "unknown"."""
    known = Path("/sys/module/nvidia/version")
    if known.is_file():
        return known.read_text().strip()
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _first_line(command) or "unknown"


def _commit() -> str:
    """Return the commit of the checkout, with a + if files have changed, or "unknown"."""
    root = Path(__file__).resolve().parent
    found = _first_line(["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"])
    return found or "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _first_line(command: list[str]) -> str:
    """Return the first line that a command prints; empty if the command is missing or fails."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.strip().partition("\n")[0] if ended.returncode == 0 else ""
