"""What runs that learn from each other know of each other: RUN/codistillation.json, and how a peer stands.

Rank 0 reads and writes it. A run's identity is drawn at its first start; the peers that it has met are those whose
identity it has noted, so what an earlier run left in a folder is never taken for the peer.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from maedistill.durable import write_durably
from maedistill.errors import DataError
from maedistill.runs.checkpoint import checkpoint_steps
from maedistill.runs.folder import RunFolder
from maedistill.runs.published import remove_published

_STATE = "codistillation.json"


@dataclass
class State:
    """RUN/codistillation.json. id: of this run; met: of its peers; left_out: the step from which on a peer is.

    licenses: of the peers that it has learned from.
    """

    id: str
    met: dict[str, str]
    left_out: dict[str, int]
    licenses: dict[str, str]

    def write(self, run: Path) -> None:
        """Write the file. Raises DataError if the disk refuses it."""
        try:
            write_durably(run / _STATE, json.dumps(asdict(self)).encode())
        except OSError as error:
            raise DataError(f"{run / _STATE} cannot be written ({error})", "free some space, start again") from error


def read_state(run: Path) -> State | None:
    """Read the file of a run; None before it is there. Raises DataError if it is damaged."""
    path = run / _STATE
    try:
        return State(**json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be used: {error}", "restore it from a copy, or start over (--fresh)") from error


def start_state(run: Path, step: int) -> State:
    """Return the state of a run that resumes at `step`, and remove what it published of later steps."""
    state = read_state(run) or State(uuid4().hex, {}, {}, {})
    remove_published(run, after=step if step else -1)
    if step == 0:
        state.left_out.clear()
    state.write(run)
    return state


def folder_of(peer: str) -> Path:
    """Return the run folder that the config names."""
    return Path(os.path.expanduser(peer))


def named_by(peer: str) -> list[str]:
    """Return the peers that a run names, as absolute paths."""
    return (RunFolder(peer).metadata().get("codistillation") or {"peers": []})["peers"]


def describe_peer(peer: Path) -> str:
    """Say how a peer stands: how its last start ended, or at which step it was last saved."""
    if not (peer / "run.json").is_file():
        return "it has not started" if peer.is_dir() else "there is no such folder"
    try:
        end = json.loads((peer / "exit.json").read_text())
        return f"it has ended: {end['reason']}"
    except (OSError, ValueError, KeyError, TypeError):
        steps = [step for step, _ in checkpoint_steps(RunFolder(peer).checkpoints)]
        return f"it runs, or was killed; its last checkpoint is of step {max(steps, default=0)}"
