"""No process outlives the one that it works for: the kernel signals a child when its parent ends (Linux).

    torchrun killed -> SIGTERM to its ranks, which save and leave -> SIGKILL to their loader workers

Imports nothing heavy: a rank asks for this before it imports torch, so that no launcher can die unnoticed before.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

# What torchrun and deepspeed's launcher leave in the environment of the processes that they start. srun needs no
# help: its daemon ends all processes of a step.
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
_PR_SET_PDEATHSIG = 1


def die_with_launcher() -> None:
    """SIGTERM to this rank when its launcher ends. A run that was started without one lives on, as under nohup."""
    if any(name in os.environ for name in _LAUNCHERS):
        parent = os.getppid()
        _end_with_parent(signal.SIGTERM, has_ended=lambda: os.getppid() != parent)


def detach_worker() -> None:
    """To be called in a loader worker: it ends with its training process, and leaves that one's signals to it.

    SIGTERM reaches whole process groups (torchrun, scancel), workers included, while training needs them to go on to
    the end of its step. A process that does not answer SIGTERM itself keeps the right to end its workers by it.
    """
    training = multiprocessing.parent_process()
    assert training is not None
    _end_with_parent(signal.SIGKILL, has_ended=lambda: not training.is_alive())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        if callable(signal.getsignal(number)):  # inherited: see preemption.py
            signal.signal(number, signal.SIG_IGN)


def _end_with_parent(number: signal.Signals, *, has_ended: Callable[[], bool]) -> None:
    """Asks the kernel for signal `number` at the parent's end, and raises it if that came first."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if has_ended():
        signal.raise_signal(number)
