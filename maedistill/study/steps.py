"""Run commands that depend on each other, in topological order, several at a time, skipping those that are done.

    [Step, ...] -> skip finished steps -> start the first whose needs are met, at most `jobs` at once -> all done
                                          a failed step holds back only the steps that need it

Each step is a process in its own session, so that Ctrl-C or SIGTERM reaches only this process, which then ends all
steps together with their loader processes. This process and every step hold OUT/steps.lock: while any of them is alive,
even after this process was killed, no other process can start steps in OUT.
"""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

from maedistill.errors import ConfigError, UserError
from maedistill.machine import cpu_share, visible_gpus
from maedistill.runs.metrics import duration

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 60.0  # between SIGTERM and SIGKILL, for a run to save a checkpoint
_MOST_NAMED = 5  # steps named in an error


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Step:
    """One command. `done` checks the disk; it raises UserError if the folder holds other results or data is missing."""

    name: str
    command: tuple[str, ...]  # a script below tools/ and its arguments, without `python`
    needs: tuple[str, ...] = ()  # names of other steps
    done: Callable[[], bool] = field(default=_never, compare=False)

    @property
    def shown(self) -> str:
        """Return the command as one would type it in a shell."""
        return f"python {shlex.join(self.command)}"


class StepsFailed(UserError):
    """The error of failed steps. exit_code: that of the first failed step."""

    def __init__(self, cause: str, remedy: str, exit_code: int) -> None:
        super().__init__(cause, remedy)
        self.exit_code = exit_code


@dataclass
class _Process:
    step: Step
    process: subprocess.Popen[bytes]
    log: Path | None
    start: float
    gpu: str | None  # assigned GPU, for CUDA_VISIBLE_DEVICES, if there are several jobs


def finished_steps(steps: Sequence[Step]) -> set[str]:
    """Return the names of the finished steps. Raises ConfigError if a finished step needs one that is not finished."""
    done = {step.name for step in steps if step.done()}
    for step in steps:
        lost = [name for name in step.needs if step.name in done and name not in done]
        if lost:
            raise ConfigError(
                f"{step.name} is done, but {lost[0]}, which it comes from, is not",
                f"bring the folder of {lost[0]} back, remove what came from it, or use another --out",
            )
    return done


def print_steps(steps: Sequence[Step]) -> None:
    """Print what `run_steps` would do."""
    done = finished_steps(steps)
    for number, step in enumerate(steps, start=1):
        state = "done" if step.name in done else "to do"
        print(f"{number}/{len(steps)} {step.name}: {state}\n    {step.shown}", flush=True)
    print(f"\n{len(steps)} steps: {len(done)} done, {len(steps) - len(done)} to do", flush=True)


def run_steps(steps: Sequence[Step], *, root: Path, out: Path, jobs: int = 1) -> None:
    """Run the steps that are not done yet, `jobs` at a time, starting the first step whose needs are met.

    root: the folder that the tools' paths are relative to. out: holds the lock and, with several jobs, one log per
    step; a single job writes to the terminal. Several jobs share the cores, unless OMP_NUM_THREADS is set, and each
    gets one of the GPUs visible to this process; if there are more jobs than GPUs, the GPUs are shared evenly.
    Raises StepsFailed at the end if steps failed, ConfigError if steps are already running in `out`.
    """
    done = finished_steps(steps)
    for step in steps:
        if step.name in done:
            print(f"skips {step.name}: done", flush=True)
    waiting = [step for step in steps if step.name not in done]
    with _locked(out) as lock, _signals() as received:
        start = partial(_start, root=root, out=out, jobs=jobs, lock=lock, total=len(steps))
        gpus = visible_gpus() if jobs > 1 else []
        failed = _work(waiting, done, jobs=jobs, gpus=gpus, start=start, received=received)
    if received:
        raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(128 + received[0])
    if failed:
        raise _failure(failed, waiting, out if jobs > 1 else None)


def _work(
    waiting: list[Step],
    done: set[str],
    *,
    jobs: int,
    gpus: Sequence[str],
    start: Callable[..., _Process],
    received: Sequence[int],
) -> dict[str, int]:
    """Move steps from `waiting` into processes until all have ended or a signal arrives. Returns failed exit codes."""
    running: list[_Process] = []
    failed: dict[str, int] = {}
    try:
        while not received:
            while len(running) < jobs and (step := _next(waiting, done)) is not None:
                waiting.remove(step)
                number = len(done) + len(failed) + len(running) + 1
                running.append(start(step, number=number, gpu=_freest(gpus, running)))
            if not running:
                break
            time.sleep(_POLL_SECONDS)
            for ended in [one for one in running if one.process.poll() is not None]:
                running.remove(ended)
                code = _report(ended)
                if code:
                    failed[ended.step.name] = code
                else:
                    done.add(ended.step.name)
    finally:
        _end(running)
    return failed


def _next(waiting: Sequence[Step], done: Collection[str]) -> Step | None:
    """Return the first step whose needs are done. A need that failed is never done."""
    return next((step for step in waiting if all(name in done for name in step.needs)), None)


def _freest(gpus: Sequence[str], running: Sequence[_Process]) -> str | None:
    """Return the GPU with the fewest jobs; ties go to the first; None without GPUs."""
    taken = [one.gpu for one in running]
    return min(gpus, key=taken.count, default=None)


def _start(
    step: Step, *, number: int, total: int, gpu: str | None, root: Path, out: Path, jobs: int, lock: IO[str]
) -> _Process:
    tool, *arguments = step.command
    log = out / "logs" / f"{step.name.replace('/', '_')}.log" if jobs > 1 else None
    where = f"  > {log}" if log is not None else ""
    shown = step.shown if gpu is None else f"CUDA_VISIBLE_DEVICES={gpu} {step.shown}"
    print(f"\n== {number}/{total} {step.name}\n$ {shown}{where}", flush=True)
    environment = dict(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(cpu_share(jobs)))
    file = _open_log(log, step) if log is not None else None
    process = subprocess.Popen(
        [sys.executable, str(root / tool), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=file,
        start_new_session=True,
        pass_fds=(lock.fileno(),),
    )
    if file is not None:
        file.close()  # the child process has its own descriptor
    return _Process(step, process, log, time.monotonic(), gpu)


def _open_log(path: Path, step: Step) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    file.write(f"$ {step.shown}\n")
    file.flush()
    return file


def _report(ended: _Process) -> int:
    """Print how a step with a log ended, with the end of the log if it failed. Returns its exit code as in a shell."""
    code, name = ended.process.returncode, ended.step.name
    code = 128 - code if code < 0 else code
    if ended.log is None:
        return code
    if code:
        last = "".join(f"\n    {line}" for line in ended.log.read_text(errors="replace").splitlines()[-2:])
        print(f"FAILED {name}, exit code {code}, {ended.log}:{last}", flush=True)
    else:
        print(f"finished {name} in {duration(time.monotonic() - ended.start)}", flush=True)
    return code


def _failure(failed: dict[str, int], waiting: Sequence[Step], out: Path | None) -> StepsFailed:
    causes = _shortened([f"{name} (exit code {code})" for name, code in failed.items()])
    held_back = f"; not started for that reason: {_shortened([step.name for step in waiting])}" if waiting else ""
    where = f"see {out / 'logs'}" if out is not None else "see above"
    return StepsFailed(
        f"failed: {causes}{held_back}",
        f"{where}, mend the cause and start the same command again: it goes on from there",
        next(iter(failed.values())),
    )


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _end(running: Sequence[_Process]) -> None:
    """End the processes and their children: SIGTERM, then SIGKILL after the grace period."""
    for one in running:
        _signal_group(one.process, signal.SIGTERM)
    limit = time.monotonic() + _GRACE_SECONDS
    while any(one.process.poll() is None for one in running) and time.monotonic() < limit:
        time.sleep(_POLL_SECONDS)
    for one in running:
        _signal_group(one.process, signal.SIGKILL)  # also ends children that a step left behind
        one.process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return  # all processes of the group have ended


@contextmanager
def _locked(out: Path) -> Iterator[IO[str]]:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "steps.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{out}: steps of another start are still running there",
                "wait until they have ended, or use another --out",
            ) from None
        yield file


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yield a list that records SIGINT and SIGTERM. An exception could lose track of a process that just started."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
