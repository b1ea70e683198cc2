"""A training tool under a stopwatch, from the command to the end of its first step, where it is sent home.

    python -m maedistill.benchmark.stopwatch SINCE FILE tools/pretrain.py CONFIG key=value ...

SINCE is the system's monotonic clock when the command was given. FILE gets {part: seconds} as JSON. Every instant
belongs to one part: to the package that is being imported, else to the innermost of `PARTS` that runs, else to what
lies around them. This file imports nothing heavy, so that none of the tool's imports is given away.
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

IMPORT = "import "  # before the package, in the names of parts
LOOP = "maedistill.pretraining.loop"  # once it is imported, all of `PARTS` is there
PARTS = {
    ("maedistill.runs.start", "join"): "process group",
    ("maedistill.pretraining.setup", "open_index"): "data index",
    (LOOP, "open_pretraining"): "student and teacher",
    (LOOP, "start_run"): "run folder and engine",
}
PYTHON, SETTINGS, BATCH, STEP = "interpreter", "settings", "first batch", "first step"


class Stopwatch:
    """Seconds by part. Parts may lie within each other: the inner one counts, and `around` what is in none."""

    def __init__(self, since: float, *, around: str) -> None:
        self.seconds: dict[str, float] = {}
        self._running, self._since = [around], since

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens in the block belongs to `name`."""
        self._note()
        self._running.append(name)
        try:
            yield
        finally:
            self._note()
            self._running.pop()

    def around(self, name: str) -> None:
        """From now on, what is in no part belongs to `name`."""
        self._note()
        self._running[0] = name

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A function whose calls are a part."""

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
    """Runs `tool` up to the end of its first step."""
    watch = Stopwatch(float(since), around=PYTHON)
    watch.around(SETTINGS)
    _time_imports(watch, then=lambda: _time_parts(watch, Path(file)))
    sys.argv = [tool, *arguments]
    runpy.run_path(tool, run_name="__main__")


def _time_imports(watch: Stopwatch, *, then: Callable[[], None]) -> None:
    """Makes each import of the main thread a part; calls `then` when the training loop has been imported."""
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
    """Makes parts of what `PARTS` names and of the first batch, and of the first step the end."""
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
