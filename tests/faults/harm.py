"""The faults that soak.py injects: what each does to a start under way, and with which exit codes that may end.

A start has two ranks. The rank that is hit ends with one of the fault's codes, the other with one of `PEER`, or both.
"""

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.launch import Start

KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM
PEER = {5, KILLED}  # how a rank ends whose peer is gone: by itself, or killed by `Start.wait` as by a launcher


@dataclass(frozen=True)
class Scene:
    """What a fault may touch. room: bytes that a file may have on a full disk: more than records, less than weights."""

    start: Start
    shards: list[Path]
    room: int
    draws: random.Random

    def rank(self) -> int:
        """One of the ranks."""
        return self.draws.randrange(len(self.start.pids))

    def worker(self) -> psutil.Process | None:
        """A loader worker of a rank, None while there is none."""
        try:
            workers = psutil.Process(self.start.pids[self.rank()]).children()
        except psutil.NoSuchProcess:
            return None
        return self.draws.choice(workers) if workers else None


@dataclass(frozen=True)
class Fault:
    """do: harms a scene, says whether it could. seconds: in which the start must end then; None where it need not."""

    do: Callable[[Scene], bool]
    codes: set[int]
    seconds: float | None = None


def kill(scene: Scene) -> bool:
    """A rank dies."""
    scene.start.signal(signal.SIGKILL, scene.rank())
    return True


def terminate(scene: Scene) -> bool:
    """A rank is asked to make room, as by a cluster."""
    scene.start.signal(signal.SIGTERM, scene.rank())
    return True


def pause(scene: Scene) -> bool:
    """A rank stalls for a while, as on an overloaded machine."""
    rank = scene.rank()
    scene.start.signal(signal.SIGSTOP, rank)
    time.sleep(scene.draws.uniform(0.5, 3))
    scene.start.signal(signal.SIGCONT, rank)
    return True


def hang_worker(scene: Scene) -> bool:
    """A loader worker stops for good, as in a read that never returns."""
    worker = scene.worker()
    if worker is not None:
        worker.suspend()
    return worker is not None


def kill_worker(scene: Scene) -> bool:
    """A loader worker dies, as for lack of memory."""
    worker = scene.worker()
    if worker is not None:
        worker.kill()
    return worker is not None


def cut_shard(scene: Scene) -> bool:
    """A shard loses its second half, and gets it back after a while."""
    shard = scene.draws.choice(scene.shards)
    whole, times = shard.read_bytes(), shard.stat()
    os.truncate(shard, len(whole) // 2)
    scene.start.ended(scene.draws.uniform(1, 5))
    shard.write_bytes(whole)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    return True


def fill_disk(scene: Scene) -> bool:
    """For a while rank 0 cannot write a file as large as the weights."""
    everything = resource.RLIM_INFINITY
    try:
        resource.prlimit(scene.start.pids[0], resource.RLIMIT_FSIZE, (scene.room, everything))
        scene.start.ended(scene.draws.uniform(1, 8))
        resource.prlimit(scene.start.pids[0], resource.RLIMIT_FSIZE, (everything, everything))
    except ProcessLookupError:  # it ended in between
        pass
    return True


FAULTS = {
    "kill": Fault(kill, {KILLED}, seconds=5),
    "terminate": Fault(terminate, {75, TERMINATED}, seconds=30),
    "pause": Fault(pause, {0}),
    "hung worker": Fault(hang_worker, {3, 5}, seconds=40),
    "killed worker": Fault(kill_worker, {3, 5}, seconds=40),
    "cut shard": Fault(cut_shard, {3}),
    "full disk": Fault(fill_disk, {3}),
}
