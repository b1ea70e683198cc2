"""A child process in which a reader meets hostile bytes: a crash, a hang or a hunger for memory ends it, not the tests.

    case -> Sandbox(case) -> pipe -> check(case) of the fuzzer's module, in the child -> verdict

`check` reads the case and asserts what must hold of the result. It may also raise one of the module's REFUSALS with one
readable line. Anything else fails the test, which hypothesis then shrinks: another exception, a warning, more than CPU
seconds, a dead or silent child, an allocation beyond MEMORY, a file left open.
"""

import importlib.util
import logging
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

CPU = 5.0  # seconds that one case may compute
SILENCE = 120.0  # seconds until a child that says nothing counts as hung, however busy the machine is
START = 300.0  # seconds to import what a reader needs
MEMORY = 3 << 29  # bytes beyond what the child has after its imports; 64 million pixels decode in a good gigabyte
LONGEST = 20_000  # letters of an error message, which may quote what a person has written


class Sandbox:
    """Starts the child when it is first needed, and again after it has died."""

    def __init__(self, module: Path, folder: Path) -> None:
        self.module, self.folder = module, folder
        self.verdicts: Counter[str] = Counter()
        self.slowest = 0.0
        self.started: tuple[subprocess.Popen, Connection] | None = None

    def __call__(self, case: Any) -> str:
        """Judge one case: "taken" or the name of our error. Raise AssertionError where a promise was broken."""
        process, pipe = self.started = self.started or self._start()
        try:
            pipe.send(case)
            assert pipe.poll(SILENCE), f"no answer within {SILENCE:g} s"
            verdict, seconds, broken = pipe.recv()
        except (EOFError, OSError) as error:
            code = process.wait(SILENCE)
            self._stop()
            raise AssertionError(f"the process died: exit code {code}") from error
        except AssertionError:
            self._stop()
            raise
        self.verdicts[verdict] += 1
        self.slowest = max(self.slowest, seconds)
        if broken:
            # the smallest, once hypothesis has shrunk it
            (self.folder / "broken.pickle").write_bytes(pickle.dumps(case))
        assert not broken, broken
        return verdict

    def summary(self) -> str:
        """Say how many cases there were, what became of them, and the slowest."""
        parts = ", ".join(f"{count} {name}" for name, count in self.verdicts.most_common())
        return f"{self.verdicts.total()} cases: {parts}; slowest {self.slowest:.2f} s of CPU"

    def close(self) -> None:
        """End the child. Raise AssertionError where its cases left files open."""
        if self.started:
            self.started[1].send(None)
            left = self.started[1].recv()
            self._stop()
            assert left < 10, f"{left} files were left open"  # an event loop of fsspec's has three, once

    def _start(self) -> tuple[subprocess.Popen, Connection]:
        here, there = multiprocessing.Pipe()
        process = subprocess.Popen(
            [sys.executable, __file__, str(self.module), str(there.fileno())],
            cwd=self.folder,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
                "XDG_CACHE_HOME": str(self.folder / "cache"),
                "TQDM_DISABLE": "1",
            },
            pass_fds=[there.fileno()],
            stdout=subprocess.DEVNULL,
        )
        there.close()
        assert here.poll(START) and here.recv() == "ready", "the child did not start"
        return process, here

    def _stop(self) -> None:
        process, pipe = self.started
        pipe.close()
        process.kill()
        process.wait()
        self.started = None


def serve(module: ModuleType, pipe: Connection) -> None:
    """Be the child: send one verdict per case until None comes."""
    warnings.simplefilter("error", append=True)  # behind the filters that our own modules have set
    logging.disable()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send("ready")
    before = None
    while (case := pipe.recv()) is not None:
        start = time.process_time()
        verdict, broken = judge(module, case)
        seconds = time.process_time() - start
        if seconds > CPU and not broken:
            broken = f"took {seconds:.1f} s of CPU"
        pipe.send(("broken" if broken else verdict, seconds, broken))
        before = before or len(os.listdir("/proc/self/fd"))  # after the first case: some are opened once for good
    pipe.send(0 if before is None else len(os.listdir("/proc/self/fd")) - before)


def judge(module: ModuleType, case: Any) -> tuple[str, str | None]:
    """Return (verdict, None), or (verdict, what was broken)."""
    try:
        module.check(case)
    except module.REFUSALS as error:
        causes = getattr(error, "cause", str(error)), getattr(error, "remedy", "none")
        fine = all(
            len(text.splitlines()) == 1 and len(text.encode(errors="backslashreplace")) < LONGEST for text in causes
        )
        return type(error).__name__, None if fine else f"a message that nobody can read: {causes!r:.3000}"
    except BaseException:
        return "broken", traceback.format_exc()
    return "taken", None


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    serve(_load(Path(sys.argv[1])), Connection(int(sys.argv[2])))
