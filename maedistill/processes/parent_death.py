"""Signals on the death of a parent, so that no process outlives the one that it works for (Linux only).

    torchrun killed -> SIGTERM to its ranks, which save and leave -> SIGKILL to their loader workers

Imports nothing heavy: a rank calls this before it imports torch, so that a launcher that dies meanwhile is noticed.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Variables that torchrun and deepspeed's launcher set in the processes that they start. srun is not listed: its
# daemon ends all processes of a step by itself.
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
_PR_SET_PDEATHSIG = 1
_FOR_TRAINING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # what a training process answers


def die_with_launcher() -> None:
    """Send SIGTERM to this rank when its launcher dies. A run started without a launcher survives, as under nohup."""
    if any(name in os.environ for name in _LAUNCHERS):
        parent = os.getppid()
        end_with_parent(signal.SIGTERM, has_ended=lambda: os.getppid() != parent)


def detach_worker() -> None:
    """Make this loader worker die with the training process and ignore the signals meant for it.

    SIGTERM reaches whole process groups (torchrun, scancel), workers included, but training needs its workers until
    the end of the step. A worker of a process without a SIGTERM handler keeps the default, so SIGTERM can end it.
    """
    training = multiprocessing.parent_process()
    assert training is not None
    end_with_parent(signal.SIGKILL, has_ended=lambda: not training.is_alive())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        if callable(signal.getsignal(number)):  # inherited from preemption.py
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_TRAINING)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back signals while workers start: before `detach_worker`, a SIGTERM to the group would end a worker."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_TRAINING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(number: signal.Signals, *, has_ended: Callable[[], bool]) -> None:
    """Ask the kernel to send signal `number` when the parent dies; raise it now if the parent is already dead."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if has_ended():
        signal.raise_signal(number)
