"""What the figures were measured on: card, driver, versions, date, cores."""

import importlib.metadata
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch


def head() -> dict[str, str]:
    """Describe this machine, in words."""
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
    """Name the card and its memory."""
    if not torch.cuda.is_available():
        return "none"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _driver() -> str:
    """Name the driver's version, where something says it."""
    known = Path("/sys/module/nvidia/version")
    if known.is_file():
        return known.read_text().strip()
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _first_line(command) or "unknown"


def _commit() -> str:
    """Name the commit of the checkout, with a + where files have changed."""
    root = Path(__file__).resolve().parent
    found = _first_line(["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"])
    return found or "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _first_line(command: list[str]) -> str:
    """Run a small command; empty where there is no such command or it fails."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.strip().partition("\n")[0] if ended.returncode == 0 else ""
