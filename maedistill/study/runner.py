"""Run commands that depend on each other, several at a time, skipping those that are done.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from maedistill.durable import make_folder
from maedistill.errors import ConfigError, UserError, join_first
from maedistill.escaping import say, shown
from maedistill.machine import GPU_JOBS_VARIABLE, JOBS_VARIABLE, cpu_share, visible_gpus
from maedistill.runs.history import duration
from maedistill.study.status import RunningStep, StatusLine

_POLL_SECONDS = 0.1
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_SECONDS = 60.0  # between SIGTERM and SIGKILL, for a run to save a checkpoint
_MOST_NAMED = 5  # steps named in an error


@dataclass(frozen=True)
class Step:
    """One command. `done` checks the disk; it raises UserError if the folder holds other results or data is missing."""

    name: str
    command: tuple[str, ...]  # of maedistill, with its arguments
    needs: tuple[str, ...] = ()  # names of other steps
    done: Callable[[], bool] = field(default=lambda: False, compare=False)

    @property
    def command_line(self) -> str:
        """Return the command as one would type it in a shell."""
        return shlex.join(["maedistill", *self.command])


class StepsFailed(UserError):
    """The error of failed steps. exit_code: that of the first failed step."""

    def __init__(self, cause: str, remedy: str, exit_code: int) -> None:
        super().__init__(cause, remedy)
        self.exit_code = exit_code


@dataclass(frozen=True)
class _Job(RunningStep):
    process: subprocess.Popen[bytes]
    gpu: str | None  # assigned GPU, for CUDA_VISIBLE_DEVICES, if there are several jobs


def finished_steps(steps: Sequence[Step]) -> set[str]:
    """Return the names of the finished steps. Raises ConfigError if a finished step needs one that is not finished."""
    done = {step.name for step in steps if step.done()}
    for step in steps:
        lost = [name for name in step.needs if step.name in done and name not in done]
        if lost:
            raise ConfigError(
                f"{step.name} is done, but {lost[0]}, which it comes from, is not",
                f"restore the folder of {lost[0]}, remove what came from it, or use another --out",
            )
    return done


def print_steps(steps: Sequence[Step]) -> None:
    """Print what `run_steps` would do."""
    done = finished_steps(steps)
    for number, step in enumerate(steps, start=1):
        state = "done" if step.name in done else "to do"
        say(f"{number}/{len(steps)} {step.name}: {state}", f"    {step.command_line}")
    say("", f"{len(steps)} steps: {len(done)} done, {len(steps) - len(done)} to do")


def run_steps(
    steps: Sequence[Step], *, out: Path, jobs: int = 1, program: Sequence[str] = (sys.executable, "-m", "maedistill")
) -> None:
    """Run the steps that are not done yet, `jobs` at a time, starting the first step whose needs are met.

    out: holds the lock and one log per step, which begins with its command. program: what the steps are commands of.
    Several jobs share the memory, and the cores unless OMP_NUM_THREADS is set. Each gets one of the GPUs that this
    process sees; if there are more jobs than GPUs, the GPUs are shared evenly. A status line shows how far the steps
    are.
    Raises StepsFailed at the end if steps failed, ConfigError if steps are already running in `out`.
    """
    done, failed, running = finished_steps(steps), dict[str, int](), list[_Job]()
    status = StatusLine()
    for name in (step.name for step in steps if step.name in done):
        status.print(f"skips {name}: done")
    waiting = [step for step in steps if step.name not in done]
    gpus = visible_gpus() if jobs > 1 else []
    with _locked(out) as lock, _signals() as received, _ended_at_last(running):
        while not received:
            while len(running) < jobs and (step := next((s for s in waiting if done.issuperset(s.needs)), None)):
                waiting.remove(step)
                place = f"{len(done) + len(failed) + len(running) + 1}/{len(steps)}"
                gpu = min(gpus, key=[job.gpu for job in running].count, default=None)  # the one with the fewest jobs
                beside = -(-jobs // max(1, len(gpus)))
                running.append(_start(step, place, gpu, beside, program=program, out=out, jobs=jobs, lock=lock))
            if not running:
                break
            time.sleep(_POLL_SECONDS)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                if code := _print_end(job, status):
                    failed[job.name] = code
                else:
                    done.add(job.name)
            status.update(running)
        status.clear()
    if received:
        raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(128 + received[0])
    if failed:
        causes = join_first([f"{name} (exit code {code})" for name, code in failed.items()], _MOST_NAMED)
        held_back = join_first([step.name for step in waiting], _MOST_NAMED)
        cause = f"failed: {causes}" + (f"; not started for that reason: {held_back}" if waiting else "")
        remedy = f"see {out / 'logs'}, remove the cause and start the same command again: it continues from there"
        raise StepsFailed(cause, remedy, next(iter(failed.values())))


def _start(
    step: Step, place: str, gpu: str | None, beside: int, *, program: Sequence[str], out: Path, jobs: int, lock: IO[str]
) -> _Job:
    """Start a step, which writes to a log. place: its number, `3/14`; beside: most jobs of a GPU at a time."""
    environment = dict(os.environ) | {JOBS_VARIABLE: str(jobs)}
    command_line = step.command_line
    if gpu is not None:
        environment |= {"CUDA_VISIBLE_DEVICES": gpu, GPU_JOBS_VARIABLE: str(beside)}
        command_line = f"CUDA_VISIBLE_DEVICES={gpu} {command_line}"
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(cpu_share(jobs)))
    log = out / "logs" / f"{step.name.replace('/', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        file.write(f"$ {shown(command_line)}\n")
        file.flush()
        process = subprocess.Popen(
            [*program, *step.command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
    return _Job(place, step.name, log, time.monotonic(), process, gpu)


def _print_end(job: _Job, status: StatusLine) -> int:
    """Print how a step ended, with the end of its log if it failed. Returns its exit code as in a shell."""
    code = job.process.returncode
    code = 128 - code if code < 0 else code
    if code:
        end = [f"    {line}" for line in job.log.read_text(errors="replace").splitlines()[-2:]]
        status.print(f"FAILED {job.name}, exit code {code}, {job.log}:", *end)
    else:
        status.print(f"{job.place} {job.name}: done in {duration(time.monotonic() - job.start)}")
    return code


@contextmanager
def _ended_at_last(running: Sequence[_Job]) -> Iterator[None]:
    """End the jobs and their children with the block: SIGTERM, then SIGKILL after the grace period."""
    try:
        yield
    finally:
        for job in running:
            _signal_group(job.process, signal.SIGTERM)
        limit = time.monotonic() + _GRACE_SECONDS
        while any(job.process.poll() is None for job in running) and time.monotonic() < limit:
            time.sleep(_POLL_SECONDS)
        for job in running:
            _signal_group(job.process, signal.SIGKILL)  # also ends children that a step left behind
            job.process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):  # all processes of the group have ended
        os.killpg(process.pid, number)


@contextmanager
def _locked(out: Path) -> Iterator[IO[str]]:
    try:
        make_folder(out)
        file = (out / "steps.lock").open("w")
    except OSError as error:
        cause = f"{out} cannot be written ({error.strerror})"
        raise ConfigError(cause, "use another --out, or correct the permissions there") from error
    with file:
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
    """Yield a list that records SIGINT, SIGTERM and the SIGHUP of a closed terminal, unless nohup ignores that one.

    An exception could lose track of a process that just started.
    """
    received: list[int] = []
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in _ENDING if number != signal.SIGHUP or not ignored]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
