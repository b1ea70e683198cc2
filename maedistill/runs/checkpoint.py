"""Checkpoints as folders of safetensors and JSON: nothing to unpickle, free of rank count and ZeRO stage.

    RUN/checkpoints/step_000000123/
        model.safetensors       parameters and persistent buffers by name, fp32
        optimizer.safetensors   "exp_avg/NAME" and "exp_avg_sq/NAME"
        ema.safetensors         the averaged weights, where the run has them
        state.json              the engine's scalars and the loop's plain state
        manifest.json, COMPLETE what proves the files above whole, see manifest.py

Saving: all ranks gather, rank 0 alone writes into `step_N.tmp`, syncs every file, then the folder, renames it to
`step_N` and syncs the parent. The rename is the one instant at which the checkpoint begins to exist: what is killed
before it leaves a `.tmp`, which nobody reads and the next save removes. COMPLETE lets a reader trust a folder that was
copied by something other than a rename. Old checkpoints go only after the new one stands, renamed to `.tmp` first.

Reading them is restore.py's.
"""

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor

from maedistill.errors import DataError
from maedistill.processes.ranks import copy_to_main
from maedistill.runs.manifest import COMPLETE, CorruptCheckpoint, seal, sync, verify, write_synced
from maedistill.training.engine import Engine
from maedistill.training.state import MOMENTS

logger = logging.getLogger(__name__)

WRITE_ERRORS = (OSError, SafetensorError)  # a full disk, a missing permission: what a person can mend
STATE = "state.json"
_NAME = re.compile(r"step_(\d{9})")


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds: copies on the CPU, which training does not touch any more."""

    step: int
    files: dict[str, dict[str, Tensor]]  # safetensors by file name
    document: str  # state.json


def take_snapshot(
    *, step: int, engine: Engine, state: dict[str, Any], ema: ModelEmaV3 | None = None
) -> Snapshot | None:
    """Collective. What a checkpoint of `step` is to hold, on rank 0; None on the others.

    state: plain JSON types, handed back by `load_latest` (restore.py).
    """
    training = engine.state()
    scalars = {} if training is None else training.scalars
    document = json.dumps({"step": step, "engine": scalars, "loop": state}, indent=1, allow_nan=False)
    averaged: dict[str, Tensor] = {}
    for name, value in ema.module.state_dict().items() if ema is not None else ():
        copy_to_main(averaged, name, value)
    if training is None:
        return None
    moments = {f"{kind}/{name}": value for kind in MOMENTS for name, value in training.moments[kind].items()}
    files = {"model.safetensors": training.weights, "optimizer.safetensors": moments}
    return Snapshot(step, files | ({"ema.safetensors": averaged} if ema is not None else {}), document)


def write_snapshot(folder: Path, snapshot: Snapshot, *, keep: int, keep_every: float | None = None) -> Path:
    """Writes a checkpoint and then prunes older ones; returns its folder. An intact one of its step is left as it is.

    keep: newest checkpoints that stay. keep_every: of each multiple of so many steps, the first checkpoint that reaches
    it stays for good and does not count. Raises one of WRITE_ERRORS; no older checkpoint is touched then, and what was
    written is gone, so that it takes no space.
    """
    assert keep >= 1
    final = folder / checkpoint_name(snapshot.step)
    temporary = final.with_name(f"{final.name}.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    for stray in folder.glob("step_*.tmp"):
        _remove(stray)
    if not _is_intact(final):
        try:
            temporary.mkdir()
            for name, tensors in snapshot.files.items():
                save_file(tensors, temporary / name)
            write_synced(temporary / STATE, snapshot.document)
            seal(temporary)
            if final.exists():
                shutil.rmtree(final)  # damaged: the run went back behind it and has come here again
            temporary.rename(final)
            sync(folder)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    _prune(folder, snapshot.step, keep, keep_every)
    return final


def save_error(folder: Path, step: int, error: Exception) -> DataError:
    """One of WRITE_ERRORS, said to the person who can mend it."""
    last = latest_step(folder)
    stands = "there is none before it" if last is None else f"that of step {last} stands"
    return DataError(
        f"saving the checkpoint of step {step} in {folder} failed ({error}); {stands}",
        "make room or mend the permissions there; starting the same command again continues the run",
    )


def checkpoint_name(step: int) -> str:
    """What the folder of a step's checkpoint is called."""
    return f"step_{step:09d}"


def checkpoint_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything in a run's folder of checkpoints that was renamed into place, in no order."""
    entries = Path(folder).iterdir() if os.path.isdir(folder) else ()  # Path.is_dir fails for a name too long
    return [(int(match[1]), path) for path in entries if (match := _NAME.fullmatch(path.name))]


def latest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint that says it is complete, without reading it; None if there is none."""
    return max((step for step, path in checkpoint_steps(folder) if (path / COMPLETE).is_file()), default=None)


def _is_intact(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except CorruptCheckpoint:
        return False
    return True


def _prune(folder: Path, step: int, keep: int, keep_every: float | None) -> None:
    """Removes what is older than the newest `keep` up to `step`. Later ones, which a damaged run left, stay."""
    steps = sorted(old for old in checkpoint_steps(folder) if old[0] <= step)
    first = {int(old // keep_every): old for old, _ in reversed(steps)} if keep_every else {}
    for_good = {old for multiple, old in first.items() if multiple > 0}
    for path in [path for old, path in steps if old not in for_good][:-keep]:
        _remove(path)


def _remove(path: Path) -> None:
    """Removes a checkpoint or what is left of one. That it cannot go is no reason to lose a new one."""
    try:
        shutil.rmtree(path if path.suffix == ".tmp" else path.rename(path.with_name(f"{path.name}.tmp")))
    except OSError as error:
        logger.warning("%s could not be removed (%s)", path, error)
