"""Stops by a signal: SIGTERM, SIGUSR1 or Ctrl-C (SIGINT) on any rank stops all ranks after the same step.

    signal on one rank -> its flag -> MAX over ranks, sent after step s, read after step s + 1 -> all stop there

The flags are reduced on the CPU, in a separate process group, while the next step computes. No rank waits for its
device, and a rank waits for another only if that one is a whole step behind. A second Ctrl-C ends the process at once.
"""

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from maedistill.processes.distributed import is_main, world_size

# Of several signals the last of these counts: DeepSpeed's launcher adds a SIGTERM to the Ctrl-C of its ranks.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME_NOTICE = 10.0  # seconds in which a signal may repeat: a scheduler signals all processes, then the launcher does
_SAME_KEYPRESS = 0.2  # seconds for Ctrl-C: a launcher in the foreground may pass on what the terminal sent already
_NOTICE = b"\nCtrl-C: the run saves and stops after this step; press it again to leave at once, without saving\n"


class PreemptionHandler:
    """Handles SIGTERM, SIGUSR1 and SIGINT until `close`. Create it in the main thread. Collective.

    A repeat of SIGTERM or SIGUSR1 after more than ten seconds ends this process at once. Within ten seconds, a repeat
    counts as the same notice. A second Ctrl-C always counts: it calls `leave`, which must not return.
    timeout_seconds: how long `agreed` waits for a rank before it fails.
    """

    def __init__(self, *, timeout_seconds: float, leave: Callable[[], object]) -> None:
        self._leave = leave
        self.signal: signal.Signals | None = None  # the signal that all ranks agreed to stop for
        self._is_done = False
        self._received: dict[int, float] = {}  # signal number -> when this rank first received it
        self._under_way: tuple[Tensor, dist.Work] | None = None
        self._group: dist.ProcessGroup | None = None
        if world_size() > 1:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def agreed(self) -> signal.Signals | None:
        """Return the signal for which all ranks stop now, None if they go on. Collective.

        Every rank calls it once at the end of each step until it returns a signal. With several ranks, the result
        belongs to the previous step, so a signal takes effect one or two steps later.
        """
        if self.signal is None:
            number = max((1 + SIGNALS.index(signal.Signals(one)) for one in self._received), default=0)
            if self._group is not None:
                before = self._read()
                if not before:
                    flag = torch.tensor(number)
                    self._under_way = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True)
                number = before
            self.signal = SIGNALS[number - 1] if number else None
        return self.signal

    def ignore_notices(self) -> None:
        """Ignore further SIGTERM and SIGUSR1: all is saved, and a launcher ends the other ranks once one has exited."""
        self._is_done = True

    def close(self) -> None:
        """Restore the signal handlers. After a stop, a command exits instead: a launcher may still send signals.

        Collective.
        """
        self._read()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _read(self) -> int:
        """Return the reduced flag of the previous step: 1 + the signal's place in SIGNALS, or 0."""
        if self._under_way is None:
            return 0
        flag, work = self._under_way
        work.wait()
        self._under_way = None
        return int(flag)

    def _receive(self, number: int, _: FrameType | None) -> None:
        """Note a signal, or end the process if it comes again."""
        now = time.monotonic()
        since = now - self._received.setdefault(number, now)
        if number == signal.SIGINT:
            if not since and is_main():
                os.write(2, _NOTICE)  # print may be at work on the same buffer when the signal comes
            if since > _SAME_KEYPRESS:
                self._leave()
        elif since > _SAME_NOTICE and not self._is_done:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
