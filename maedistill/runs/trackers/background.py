"""Trackers in threads of their own: none makes a run wait for long, and none ends it.

    line of metrics.jsonl, picture -> a queue for each tracker -> its thread -> its library

RUN/trackers/NAME.json has the id of the run there, with which a continued run appends to it, and the steps of its
newest pictures.
The first error that a library cannot recover from is said, and ends its tracker for this start.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from PIL import Image

from maedistill.durable import make_folder
from maedistill.errors import DataError
from maedistill.escaping import masked, say, warn
from maedistill.runs.records import write_text
from maedistill.runs.trackers.board import Board
from maedistill.runs.trackers.mlflow_run import ENVIRONMENT, MlflowRun
from maedistill.runs.trackers.tracker import End, Opening, Tracker, scalars_of
from maedistill.runs.trackers.wandb_run import WandbRun

OPENERS: dict[str, Callable[[Opening], Tracker]] = {"tensorboard": Board, "wandb": WandbRun, "mlflow": MlflowRun}
_MODULES = {"tensorboard": "torch.utils.tensorboard"}
_MOST_WAITING = 10_000  # lines and pictures
_START_SECONDS = 10.0  # that a run waits for all of them


class Background:
    """One tracker, in its thread. history: the lines of metrics.jsonl; it gets those that it lacks."""

    def __init__(self, name: str, opening: Opening, history: Iterable[Mapping[str, Any]]) -> None:
        self._name, self._file = name, opening.folder / "trackers" / f"{name}.json"
        self._queue: SimpleQueue[Callable[[Tracker], object] | None] = SimpleQueue()
        self._pictures: dict[str, int] = {}  # the step of the last one by name
        self._given_up, self.opened = False, Event()
        self._unrecorded = False
        self._history = deque(history)  # emptied as it goes out: a long run has many lines
        self._thread = Thread(target=self._work, args=(opening,), name=name, daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand on the numbers of a line of metrics.jsonl."""
        self._put(lambda tracker: _send(tracker, step, values))

    def picture(self, step: int, name: str, pixels: Any) -> None:
        """Hand on an image, uint8 [H, W, 3]."""
        self._put(lambda tracker: self._draw(tracker, step, name, pixels))

    def finish(self, end: End) -> None:
        """Ask the tracker to close, after what waits."""
        self._queue.put(lambda tracker: tracker.close(end))
        self._queue.put(None)

    def wait(self, deadline: float) -> None:
        """Wait until it is closed, not beyond a time of time.monotonic()."""
        self._thread.join(0.0 if self._given_up else max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._give_up("it did not take the last ones in time")

    def _put(self, act: Callable[[Tracker], object]) -> None:
        if self._queue.qsize() >= _MOST_WAITING:
            self._give_up(f"{_MOST_WAITING:,} of them wait for it")
        if not self._given_up:
            self._queue.put(act)

    def _work(self, opening: Opening) -> None:
        try:
            saved = json.loads(self._file.read_text()) if self._file.is_file() else {}
            tracker = OPENERS[self._name](replace(opening, id=saved.get("id")))
            self._pictures = saved.get("pictures", {})
            self._record(tracker)
            self.opened.set()
            while self._history:
                values = self._history.popleft()
                _send(tracker, values["step"], values)
            while (act := self._queue.get()) is not None:
                act(tracker)
        except Exception as error:  # their libraries raise what they like
            self._give_up(f"{type(error).__name__}: {error}")
        finally:
            self._history.clear()
            self.opened.set()

    def _draw(self, tracker: Tracker, step: int, name: str, pixels: Any) -> None:
        if tracker.id is None or step > self._pictures.get(name, -1):
            tracker.picture(step, name, pixels)
            self._pictures[name] = step
            self._record(tracker)

    def _record(self, tracker: Tracker) -> None:
        """Write RUN/trackers/NAME.json. A full disk here is no reason to keep records from a server."""
        if tracker.id is None:
            return
        try:
            make_folder(self._file.parent)
            write_text(self._file, json.dumps({"id": tracker.id, "pictures": self._pictures}) + "\n")
            self._unrecorded = False
        except (OSError, DataError) as error:
            if not self._unrecorded:
                warn(f"{self._file} is not up to date: {error.cause if isinstance(error, DataError) else error}")
            self._unrecorded = True

    def _give_up(self, why: str) -> None:
        if not self._given_up:
            self._given_up = True
            warn(f"{self._name} gets no more records in this start: {masked(why)[:300]}")


def open_trackers(
    names: Iterable[str], folder: Path, *, first_step: int, written: Mapping[str, int], history: Sequence[Any]
) -> list[Background]:
    """Open the trackers of a run; one whose package cannot be imported is left out with a message. See `Opening`."""
    trackers = []
    for name in dict.fromkeys(names):
        for variable, value in (ENVIRONMENT if name == "mlflow" else {}).items():
            os.environ.setdefault(variable, value)
        # Loader workers are forked later: a module that is half imported then would stay so in them.
        Image.init()  # what the first picture would import
        try:
            import_module(_MODULES.get(name, name))
        except ImportError as error:
            say(f"nothing is sent to {name}: {error} (pip install 'maedistill[{name}]')")
        except Exception as error:  # of packages that do not fit each other
            warn(f"nothing is sent to {name}: {type(error).__name__}: {masked(str(error))[:300]}")
        else:
            trackers.append(Background(name, Opening(folder, first_step, None, written), history))
    deadline = time.monotonic() + _START_SECONDS
    for tracker in trackers:
        tracker.opened.wait(max(0.0, deadline - time.monotonic()))
    return trackers


def close_trackers(trackers: Sequence[Background], end: End, deadline: float) -> None:
    """Close all of them before a deadline of time.monotonic(). Records not taken by then are lost there."""
    for tracker in trackers:
        tracker.finish(end)
    for tracker in trackers:
        tracker.wait(deadline)


def _send(tracker: Tracker, step: int, values: Mapping[str, Any]) -> None:
    """Hand on the numbers that a tracker does not have yet."""
    new = {tag: value for tag, value in scalars_of(values).items() if step > tracker.last.get(tag, -1)}
    if new:
        tracker.scalars(step, new)
        tracker.last |= dict.fromkeys(new, step)
