"""The process of one part: imports its module and calls its `run`."""

import importlib
import os
import sys
import traceback
import warnings
from pathlib import Path

from gpu_parts.check import Check
from gpu_parts.runner import Child


def run_child(told: Child) -> None:
    """Run the part and leave the process: 0, or 1 with a traceback.

    Without the interpreter's teardown, on whose way the threads of a process group may abort or wait.
    """
    warnings.filterwarnings("ignore", "Synchronization debug mode")  # says that it is new, each time it is set
    code = 1
    try:
        check = Check(told.part, told.tiny, Path(told.out), Path(told.work), told.until)
        importlib.import_module(told.module).run(check)
        code = 0
    except BaseException:  # an interrupt too: the exit code says so
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
