"""Time a training tool by part, from the command to the end of its first step, and stop it there.

    python -m maedistill.benchmark.stopwatch SINCE FILE tools/pretrain.py CONFIG key=value ...

SINCE is the value of the system's monotonic clock when the command was given. FILE receives {part: seconds} as JSON.
Every instant belongs to exactly one part: the package that is being imported, else the innermost running part of
`PARTS`, else the surrounding phase. This file imports nothing heavy, so that the tool's imports are timed in full.
"""

import builtins
import functools
import json
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from maedistill.errors import Preempted

IMPORT = "import "  # prefix of the package in the names of parts
LOOP = "maedistill.pretraining.loop"  # once it is imported, all modules of `PARTS` are loaded
PARTS = {
    ("maedistill.runs.start", "join"): "process group",
    ("maedistill.pretraining.setup", "open_index"): "data index",
    (LOOP, "open_pretraining"): "student and teacher",
    (LOOP, "start_run"): "run folder and engine",
}
PYTHON, SETTINGS, BATCH, STEP = "interpreter", "settings", "first batch", "first step"


class Stopwatch:
    """Seconds by part. Parts may be nested: time counts for the innermost one, or for `around` outside all parts."""

    def __init__(self, since: float, *, around: str) -> None:
        self.seconds: dict[str, float] = {}
        self._running, self._since = [around], since

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block for `name`."""
        self._note()
        self._running.append(name)
        try:
            yield
        finally:
            self._note()
            self._running.pop()

    def around(self, name: str) -> None:
        """Count time outside all parts for `name` from now on."""
        self._note()
        self._running[0] = name

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return a wrapper of `function` whose calls count for the part `name`."""

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            with self.part(name):
                return function(*arguments, **keywords)

        return call

    def _note(self) -> None:
        now, name = time.monotonic(), self._running[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


def main(since: str, file: str, tool: str, *arguments: str) -> None:
    """Run `tool` up to the end of its first step."""
    watch = Stopwatch(float(since), around=PYTHON)
    watch.around(SETTINGS)
    _time_imports(watch, then=lambda: _time_parts(watch, Path(file)))
    sys.argv = [tool, *arguments]
    runpy.run_path(tool, run_name="__main__")


def _time_imports(watch: Stopwatch, *, then: Callable[[], None]) -> None:
    """Make each import of the main thread a part; call `then` when the training loop has been imported."""
    load, main_thread = builtins.__import__, threading.get_ident()
    waiting = [then]

    def timed_import(name: str, *arguments: Any, **keywords: Any) -> ModuleType:
        level = keywords.get("level", arguments[3] if len(arguments) > 3 else 0)
        if level or threading.get_ident() != main_thread:  # a relative import stays in its package
            return load(name, *arguments, **keywords)
        with watch.part(IMPORT + name.partition(".")[0]):
            module = load(name, *arguments, **keywords)
        if waiting and name == LOOP:
            waiting.pop()()
        return module

    builtins.__import__ = timed_import


def _time_parts(watch: Stopwatch, file: Path) -> None:
    """Make parts of the functions in `PARTS` and of the first batch; stop the tool after its first step."""
    for (module, name), part in PARTS.items():
        setattr(sys.modules[module], name, watch.timed(getattr(sys.modules[module], name), part))
    loop, run = sys.modules[LOOP], sys.modules["maedistill.runs.run"].Run
    load_batches = watch.timed(loop.training_batches, BATCH)

    def batches(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        return iter(watch.timed(load_batches(*arguments, **keywords).__next__, BATCH), None)

    def end_step(run: Any, crops: Any) -> bool:
        if run.device.type == "cuda":
            sys.modules["torch"].cuda.synchronize()
        watch.around(STEP)
        file.write_text(json.dumps(watch.seconds))
        raise Preempted("the stopwatch", 1)

    loop.training_batches, run.end_step = batches, end_step
    watch.around(STEP)


if __name__ == "__main__":
    main(*sys.argv[1:])
