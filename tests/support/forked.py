"""Work in a forked process of the tests: it ends with the work, whatever that does, and never gets back to pytest."""

import os
import traceback
from collections.abc import Callable


def fork(work: Callable[[], int | None]) -> int:
    """Start `work` in a process, which exits with what it returns, 0 for None, 1 for an error; return the pid."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    """Wait for a process; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
