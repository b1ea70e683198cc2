"""Run tests/test_gpu.py with pytest."""

import subprocess
import sys

from gpu_parts.check import ROOT, TIME_UP, Check

# Warnings are errors in this project, and torch warns that its debug mode for synchronization is a prototype.
_COMMAND = ["-m", "pytest", "tests/test_gpu.py", "-v", "-p", "no:cacheprovider", "-W", "ignore:Synchronization debug"]


def run(check: Check) -> None:
    """Run the tests and record pytest's last line. If a test hangs, this line names it."""
    if not check.on_card:
        check.skipped("tests/test_gpu.py", "no card")
        return
    log = check.log("test_gpu.txt")
    with log.open("w") as file:
        try:
            command = [sys.executable, "-u", *_COMMAND]
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=max(1, check.left)).returncode
        except subprocess.TimeoutExpired:
            code = None
    lines = [line.strip("= \n") for line in log.read_text(errors="replace").splitlines() if line.strip("= \n")]
    last = lines[-1] if lines else "it said nothing"
    if code is None and not any(" FAILED" in line for line in lines):
        check.skipped("the rest of tests/test_gpu.py", f"{TIME_UP}: {last}")
    else:
        check.verdict("tests/test_gpu.py", code == 0, last)
