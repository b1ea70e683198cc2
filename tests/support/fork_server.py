"""Start the training tools by fork: torch, timm and DeepSpeed are imported once, not at each of a hundred starts.

    python -m tests.support.fork_server          one JSON object per line in, one line out; see launch.py

{"words", "variables", "out", "err"} forks a process, a session of its own, that runs `python WORDS ...` as a person
would have started it: the same file (or `-m MODULE`) as `__main__`, the same arguments, its output in two files. The
answer is its pid.
{"wait": pid} waits for its end and answers with the exit code, negative for a signal. End of input kills what is left.
Nothing that a fork would tear may exist before: no thread, no process group; the first is checked at every start.

The process may be altered through its environment: FAULTS_FSYNC=S lets each fsync take S seconds longer (a slow disk,
so that checkpoint writes last), FAULTS_PACE=S each micro-batch, FAULTS_CUTS=RUN:OUT records power cuts (power_cut.py),
FAULTS_FLOAT64=1 computes in float64 (float64.py).
"""

import gc
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def serve() -> dict[str, Any]:
    """Answer requests to the end of input. Return only in a child, with its request."""
    children = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            children.discard(request["wait"])
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            assert len(os.listdir("/proc/self/task")) == 1, "a fork would tear the threads"
            answer = os.fork()
            if not answer:
                return request
            children.add(answer)
        print(answer, flush=True)
    for child in children:
        os.kill(child, signal.SIGKILL)
        with suppress(ProcessLookupError):  # it has no session of its own yet
            os.killpg(child, signal.SIGKILL)
    sys.exit()


def import_all() -> None:
    """Import everything that a training process imports, sooner or later."""
    import deepspeed.utils  # noqa: F401
    import torch._dynamo  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import maedistill.evaluation.feature_eval
    import maedistill.finetuning.loop
    import maedistill.pretraining.loop  # noqa: F401
    from maedistill.evaluation import scorecard

    # tests ask whether it is measured, not how fast; test_latency.py is about the numbers
    scorecard.measure_latency = partial(scorecard.measure_latency, seconds=0.05)


def become(request: dict[str, Any]) -> None:
    """Turn this child into what the request asks for, up to the first line of its program."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, file in ((1, request["out"]), (2, request["err"])):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(request["variables"])
    sys.argv = request["words"][1:] if request["words"][0] == "-m" else request["words"]
    alter(os.environ.get)


def alter(setting: Callable[[str], str | None]) -> None:
    """Slow this process down or widen its numbers, where `setting` says so."""
    if seconds := setting("FAULTS_FSYNC"):
        os.fsync = slower(os.fsync, float(seconds))
    if seconds := setting("FAULTS_PACE"):
        from maedistill.training.engine import Engine

        Engine.__call__ = slower(Engine.__call__, float(seconds))
    if cuts := setting("FAULTS_CUTS"):  # RUN:OUT
        from tests.support.power_cut import Recorder

        Recorder(*map(Path, cuts.split(":")))
    if setting("FAULTS_FLOAT64"):
        from tests.support.float64 import compute_in_float64

        compute_in_float64()


def slower(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """Return the same function, after a pause."""

    def paused(*arguments: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments)

    return paused


if __name__ == "__main__":
    os.chdir(ROOT)
    import_all()
    gc.freeze()  # children share these objects; without this, each of DeepSpeed's collections goes through all of them
    asked = serve()
    become(asked)
    if asked["words"][0] == "-m":
        runpy.run_module(asked["words"][1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(asked["words"][0], run_name="__main__")
