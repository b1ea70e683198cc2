"""Asked to leave: SIGTERM or SIGUSR1 on any rank becomes a stop of all ranks after the same step.

    signal on one rank -> its flag -> MAX over ranks, sent after step s, read after step s + 1 -> all stop there

The flags travel on the CPU in a group of their own while the next step computes: nobody waits for the device, and at
most for a rank that is a whole step behind. Ctrl-C stays what it is.
"""

import signal
import time
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from maedistill.processes.ranks import world_size

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SAME_NOTICE = 10.0  # seconds within which a signal may come again: from a scheduler to all, then from the launcher


class PreemptionHandler:
    """Answers SIGTERM and SIGUSR1 from its making until `close`. Collective; to be made in the main thread.

    The same signal once more, later than the ten seconds in which one notice may come twice, ends this process at once.
    timeout_seconds: how long `agreed` waits for a rank before it fails.
    """

    def __init__(self, *, timeout_seconds: float) -> None:
        self.signal: signal.Signals | None = None  # what all ranks stop for, once they agreed
        self._received: dict[int, float] = {}  # signal number -> when it first came to this rank
        self._under_way: tuple[Tensor, dist.Work] | None = None
        self._group = None
        if world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def agreed(self) -> bool:
        """Whether all ranks stop now. Collective: every rank calls it once at the end of each step, until it says so.

        With several ranks, the answer is that of the step before: a signal takes effect one or two steps later.
        """
        if self.signal is None:
            number = max(self._received, default=0)
            if self._group is not None:
                before = self._read()
                if not before:
                    flag = torch.tensor(number)
                    self._under_way = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True)
                number = before
            self.signal = signal.Signals(number) if number else None
        return self.signal is not None

    def close(self) -> None:
        """Gives the signals back. Collective. After a stop, rather leave: a launcher may still be sending them."""
        self._read()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _read(self) -> int:
        """What the flags sent after the step before came to."""
        if self._under_way is None:
            return 0
        flag, work = self._under_way
        work.wait()
        self._under_way = None
        return int(flag)

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._received.setdefault(number, now) > _SAME_NOTICE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
