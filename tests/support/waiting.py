"""Waiting for something outside of this process: a condition that becomes true, a process that ends."""

import time
from collections.abc import Callable
from pathlib import Path


def lives(pid: int) -> bool:
    """Return whether a process runs; one that has ended and waits for its parent to collect it does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], object], *, seconds: float = 120) -> None:
    """Wait until `condition()` is true; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain"
        time.sleep(0.02)
