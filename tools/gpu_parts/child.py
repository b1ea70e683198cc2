"""The process of one part: imports its module and calls its `run`."""

import importlib
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

from gpu_parts.check import Check
from gpu_parts.runner import Child
from maedistill.processes.parent_death import end_with_parent


def run_child(told: Child) -> None:
    """Run the part and exit the process with code 0, or with code 1 and a traceback.

    The interpreter's teardown is skipped, because threads of a process group may abort or hang in it.
    """
    # A part does not outlive the tool. What it has started, such as runs without a launcher, may.
    end_with_parent(signal.SIGKILL, has_ended=lambda: os.getppid() != told.parent)
    warnings.filterwarnings("ignore", "Synchronization debug mode")  # torch warns each time it is set
    code = 1
    try:
        check = Check(told.part, told.tiny, Path(told.out), Path(told.work), told.until)
        importlib.import_module(told.module).run(check)
        code = 0
    except BaseException:  # includes interrupts: the exit code reports them
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
