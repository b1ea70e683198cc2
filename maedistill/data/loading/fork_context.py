"""A multiprocessing context for torch's DataLoader whose queues need no file system.

multiprocessing's own locks and events are named semaphores. Each takes a page of /dev/shm for as long as it is in use:
a loader with 8 workers 128 KB. So a loader could not start where /dev/shm is small, read-only or missing.
"""

import mmap
import os
import select
import threading
from multiprocessing.context import ForkContext
from time import monotonic
from typing import Any


class ForkLock:
    """A lock of this process and those that it forks later: an eventfd, which ends with the last of them."""

    def __init__(self) -> None:
        self._file = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take the lock. Return whether that was possible, within `timeout` seconds or, without `block`, at once."""
        deadline, poll = monotonic() + (timeout or 0.0), select.poll()
        poll.register(self._file, select.POLLIN)
        while True:
            try:
                return bool(os.read(self._file, 8))
            except BlockingIOError:
                left = None if timeout is None else deadline - monotonic()  # seconds
                if not block or (left is not None and left <= 0):
                    return False
                poll.poll(None if left is None else 1000 * left)

    def release(self) -> None:
        """Give the lock back."""
        os.eventfd_write(self._file, 1)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        os.close(self._file)


class ForkEvent:
    """What torch uses of an event: a byte of memory shared with the processes that are forked later."""

    def __init__(self) -> None:
        self._flag = mmap.mmap(-1, 1)

    def is_set(self) -> bool:
        """Return whether any of the processes has set it."""
        return self._flag[0] != 0

    def set(self) -> None:
        """Set it in all of the processes."""
        self._flag[0] = 1


class FileFreeForkContext(ForkContext):
    """The context `fork`, with locks, semaphores and events that are in no file system."""

    def Lock(self) -> Any:
        """Return a lock."""
        return ForkLock()

    def Event(self) -> Any:
        """Return an event."""
        return ForkEvent()

    def BoundedSemaphore(self, value: int = 1) -> Any:
        """Return the counter of a queue's free places. Each process has its own: torch's queues have 2^31 places."""
        return threading.Semaphore(value)
