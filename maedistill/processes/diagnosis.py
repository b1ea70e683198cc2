"""Diagnosis of a stalled or failed run: which ranks are to blame, from the heartbeats that heartbeat.py collects.

Heartbeats of all ranks, read twice -> Diagnosis: the error to exit with, and the lost ranks
"""

import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from maedistill.errors import ConfigError, DataError, NumericsError, PeerError, UserError

_GOES_ON = "the same command continues from the newest checkpoint"
# Matches gloo's errors, which are plain RuntimeErrors. Errors of NCCL and of the store have types of their own.
_GLOO = re.compile(r"third_party/gloo/|Application timeout caused pair closure|Connection (closed|reset) by peer")
_SILENT_SECONDS = 5.0  # without a Heartbeat, until its process is looked up
_MACHINE_SILENT_SECONDS = 60.0  # without a Heartbeat of any rank of a machine, until it counts as lost
_WAITING = ("torch/distributed/", "deepspeed/comm/", "maedistill/processes/preemption.py")  # files of a waiting stack


@dataclass(frozen=True)
class Heartbeat:
    """The status that a rank publishes once a round."""

    rank: int
    host: str
    process: int
    rounds: int = 0  # rounds completed; grows while the process lives
    moves: int = 0  # number of calls of `RankWatch.beat` by its main thread
    step: int = 0  # the step of the last `beat`
    place: str = "?"  # where in maedistill the main thread is now
    waits: bool = False  # whether it waits for other ranks there
    left: bool = False  # this is its last Heartbeat, after a normal end
    pid_space: str = ""  # processes with the same value see each other's process ids

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.process}, step {self.step})"


@dataclass(frozen=True)
class Diagnosis:
    """The error that a rank exits with; `lost` are the ranks that cannot report it themselves."""

    error: UserError
    lost: tuple[int, ...] = ()

    def to_text(self) -> str:
        """Return the diagnosis as JSON for the other ranks."""
        return json.dumps([self.error.exit_code, self.error.cause, self.error.remedy, self.lost])

    @classmethod
    def from_text(cls, text: str | bytes) -> "Diagnosis":
        """Read the JSON of another rank."""
        code, cause, remedy, lost = json.loads(text)
        return cls(_kind(code)(cause, remedy), tuple(lost))


def diagnose(before: Sequence[Heartbeat], after: Sequence[Heartbeat], *, why: str) -> Diagnosis:
    """Name the ranks that hold up the run, from the Heartbeats of all ranks at two times a few rounds apart.

    These are the ranks that were silent in between; else the ranks with the fewest `moves`, and among those the ranks
    that do not wait for others. why: the reason for the diagnosis, quoted in the error.
    """
    silent = [new for old, new in zip(before, after, strict=True) if new.rounds == old.rounds and not new.left]
    if silent:
        return _lost(", ".join(map(str, silent)), tuple(beat.rank for beat in silent))
    here = [beat for beat in after if not beat.left]
    least = min(beat.moves for beat in here)
    behind = [beat for beat in here if beat.moves == least]
    behind = [beat for beat in behind if not beat.waits] or behind
    places = ", ".join(f"{beat} is in {beat.place}" for beat in behind)
    others = "; the others wait" if len(behind) < len(here) else ""
    remedy = f"see the stacks in its output; if it was only slow, raise engine.timeout_seconds; {_GOES_ON}"
    return Diagnosis(PeerError(f"{why}: {places}{others}", remedy))


def find_lost(beats: Sequence[Heartbeat], silent_seconds: Mapping[int, float], *, pid_space: str) -> Diagnosis | None:
    """Name the ranks that are certainly gone while this rank waits; return None if there are none.

    beats: the latest Heartbeat of each rank. silent_seconds: seconds without a new Heartbeat, by rank. A silent rank of
    this machine is gone if its process is; a frozen one may come back. A silent rank of another machine is gone if
    every rank of that machine has been silent for a minute.
    """

    def is_gone(beat: Heartbeat) -> bool:
        if beat.pid_space == pid_space:
            return process_state(beat.process) in ("", "X", "Z")  # Z: a zombie, which its parent has not reaped yet
        machine = (silent_seconds[other.rank] for other in beats if other.pid_space == beat.pid_space)
        return min(machine) >= _MACHINE_SILENT_SECONDS

    silent = [beat for beat in beats if not beat.left and silent_seconds[beat.rank] >= _SILENT_SECONDS]
    gone = [beat for beat in silent if is_gone(beat)]
    if not gone:
        return None
    here = all(beat.pid_space == pid_space for beat in gone)
    fate = "ended" if here else "ended, or the machine cannot be reached"
    return _lost(", ".join(map(str, gone)), tuple(beat.rank for beat in gone), fate=fate)


def pid_space() -> str:
    """Identify this machine and its namespace of process ids: containers on one machine may not see each other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return platform.node()


def process_state(process: int) -> str:
    """Return the state of a process of this machine as the kernel's letter, such as T: stopped; "" if it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def diagnose_store() -> Diagnosis:
    """Diagnose a store that does not answer: its host is lost, which is torchrun or else rank 0."""
    address = f"at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _lost(f"torchrun {address}", ())
    return _lost(f"rank 0 {address}", (0,))


def failure_of(beat: Heartbeat, error: BaseException) -> Diagnosis:
    """Return the diagnosis that tells the other ranks about an error of this one."""
    who = f"rank {beat.rank} on {beat.host}"
    if isinstance(error, UserError):
        return Diagnosis(_kind(error.exit_code)(f"{who}: {error.cause}", error.remedy))
    return Diagnosis(PeerError(f"{who} failed: {type(error).__name__}: {error}", f"see its traceback; {_GOES_ON}"))


def peer_error(error: BaseException) -> PeerError | None:
    """Translate the error of a failed collective or store for users; return None for any other error."""
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _GLOO.search(str(error))):
        line = next(iter(str(error).splitlines()), type(error).__name__)
        return PeerError(f"another rank of this run was lost ({line})", f"see its output; {_GOES_ON}")
    return None


@contextmanager
def peer_errors() -> Iterator[None]:
    """Raise what a failed collective or store raises in the block as its PeerError."""
    try:
        yield
    except Exception as error:
        if (translated := peer_error(error)) is None:
            raise
        raise translated from error


def thread_position(thread: int) -> tuple[str, bool]:
    """Return the innermost position of a thread in maedistill, and whether it waits for other ranks there."""
    innermost = frame = sys._current_frames().get(thread)
    waits = False
    while frame is not None:
        waits = waits or any(part in frame.f_code.co_filename for part in _WAITING)
        if frame.f_globals.get("__name__", "").startswith("maedistill."):
            break
        frame = frame.f_back
    if (place := frame or innermost) is None:
        return "?", waits
    return f"{os.path.basename(place.f_code.co_filename)}:{place.f_lineno} {place.f_code.co_name}", waits


def _kind(exit_code: int) -> type[UserError]:
    kinds = {kind.exit_code: kind for kind in (ConfigError, DataError, NumericsError)}
    return kinds.get(exit_code, PeerError)


def _lost(who: str, ranks: tuple[int, ...], *, fate: str = "ended, froze or cannot be reached") -> Diagnosis:
    remedy = f"look there for what ended it: its output, memory, the machine itself; {_GOES_ON}"
    return Diagnosis(PeerError(f"{who} {fate}", remedy), ranks)
