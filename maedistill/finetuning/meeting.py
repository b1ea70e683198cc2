"""What runs that learn from each other know about each other: RUN/codistillation.json, and the state of a peer.

Rank 0 reads and writes it. A run's identity is drawn at its first start, and again by a start at step 0 with other
settings, which makes another run of it; each start is numbered by a draw too. Runs have met when each has noted the
other, so what an earlier run left in a folder is never taken for the peer.
"""

import errno
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from maedistill.durable import write_durably
from maedistill.errors import ConfigError, DataError
from maedistill.runs.checkpoint import checkpoint_steps
from maedistill.runs.folder import RunFolder
from maedistill.runs.history import last_end
from maedistill.runs.published import remove_published
from maedistill.weights.from_run import validated_metadata

_STATE, _KEY = "codistillation.json", "distill.codistillation"
NO_FOLDER = "there is no such folder"


@dataclass
class State:
    """RUN/codistillation.json. id: of this run; start: of its last start; settings: a digest, which goes with the id.

    met: the marks of its peers; left_out: the step from which on a peer is; licenses: of those it has learned from.
    """

    id: str
    start: str
    settings: str
    met: dict[str, list[str]]
    left_out: dict[str, int]
    licenses: dict[str, str]

    @property
    def mark(self) -> list[str]:
        """Return what peers note."""
        return [self.id, self.start]

    def left_out_since(self, run: Path, id: str) -> int | None:
        """Return the step from which on another run is left out. id: its own; its folder may have held another."""
        for peer, step in self.left_out.items():
            if os.path.realpath(folder_of(peer)) == os.path.realpath(run) and self.met.get(peer, [id])[0] == id:
                return step
        return None

    def write(self, run: Path) -> None:
        """Write the file. Raises DataError if the disk refuses it."""
        try:
            write_durably(run / _STATE, json.dumps(asdict(self)).encode())
        except OSError as error:
            raise DataError(f"{run / _STATE} cannot be written ({error})", "free some space, start again") from error


def read_state(run: Path, *, is_own: bool = False) -> State | None:
    """Read the file of a run; None before it is there. Raises DataError if it is damaged.

    is_own: nobody else writes it. A peer's file may be replaced just now: then None, and the next look finds it.
    """
    path = run / _STATE
    try:
        return State(**json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ESTALE and not is_own:  # of network file systems
            return None
        raise DataError(f"{path} cannot be read: {error}", "check the disk and the permissions there") from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be used: {error}", "restore it from a copy, or start over (--fresh)") from error


def start_state(run: Path, step: int, settings: str) -> State:
    """Return the state of a run that resumes at `step`, and remove what it published of later steps."""
    state = read_state(run, is_own=True)
    if state is None or (step == 0 and state.settings != settings):
        state = State(uuid4().hex, "", settings, {}, {}, {})
    state.start = uuid4().hex
    if step == 0:
        state.left_out.clear()
    state.write(run)  # first: a peer that has read weights then looks whose they were
    remove_published(run, after=step if step else -1)
    return state


def folder_of(peer: str) -> Path:
    """Return the run folder that the config names."""
    return Path(os.path.expanduser(peer))


def entry_of(peer: str) -> dict[str, Any]:
    """Return what a run says to its peers, whom it names by absolute paths."""
    return validated_metadata(RunFolder(folder_of(peer))).get("codistillation") or {"peers": []}


def last_saved(peer: Path) -> int:
    """Return the step of a run's last checkpoint, or 0. From the first one on, only --fresh makes another run of it."""
    return max((step for step, _ in checkpoint_steps(RunFolder(peer).checkpoints)), default=0)


def why_no_pair(peer: str, run: Path) -> ConfigError | None:
    """Return an error unless a peer names the run in this folder."""
    if os.path.realpath(run) in (named := entry_of(peer)["peers"]):
        return None
    cause = f"{_KEY}.peers: {peer} does not name this run, {run}, but {', '.join(named) or 'none'}"
    return ConfigError(cause, "let the runs name each other")


def why_incompatible(peer: str, own: dict[str, Any]) -> ConfigError | None:
    """Return an error unless a peer, which names the run, fits the run's own entry."""
    entry = entry_of(peer)
    if any(entry[name] != own[name] for name in ("every", "first", "last")):
        theirs, mine = (f"every {e['every']} steps from {e['first']} to {e['last']}" for e in (entry, own))
        cause = f"{_KEY}: {peer} exchanges weights {theirs}, this run {mine}"
        return ConfigError(cause, "give both the same every_steps and schedule, and as many steps per epoch")
    if entry["seed"] == own["seed"]:
        cause = f"{_KEY}: {peer} has the same seed, {own['seed']}: each run needs its own"
        return ConfigError(cause, "give each run a seed of its own")
    return None


def describe_peer(peer: Path) -> str:
    """Describe the state of a peer: how its last start ended, or at which step it was last saved."""
    if not (peer / "run.json").is_file():
        return "it has not started" if peer.is_dir() else NO_FOLDER
    if ended := last_end(peer):
        return f"it has ended: {ended}"
    return f"it runs, or was killed; its last checkpoint is of step {last_saved(peer)}"
