"""Checkpoints as folders of safetensors and JSON: no pickle, independent of rank count and ZeRO stage.

    RUN/checkpoints/step_000000123/
        model.safetensors       parameters and persistent buffers by name, fp32
        optimizer.safetensors   "exp_avg/NAME" and "exp_avg_sq/NAME"
        ema.safetensors         the averaged weights, if the run has them
        past.safetensors        the weights when the epoch began, with distill.past.source=weights
        teacher.safetensors     the teacher that is the student's moving average, with teacher.source=ema
        statistics.safetensors  what was measured of the teacher's channels, with align.normalize=stored; of a further
                                teacher in statistics2.safetensors and so on
        state.json              the engine's scalars and the loop's plain state, see state.py
        config.yaml, run.json   the run's, for a start that finds them gone or damaged in RUN
        manifest.json, COMPLETE checksums of the files above, see manifest.py

Saving: all ranks gather, rank 0 alone writes into `step_N.tmp`, syncs every file, then the folder, renames it to
`step_N` and syncs the parent. The checkpoint exists from the rename on: a kill before it leaves a `.tmp` folder, which
is never read and which the next save removes. COMPLETE lets a reader trust a folder that was copied by other means
than a rename. Old checkpoints are removed only after the new one exists, and are renamed to `.tmp` first.

restore.py reads checkpoints.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from maedistill.durable import make_folder, sync, write_synced
from maedistill.escaping import warn
from maedistill.processes.distributed import copy_to_main
from maedistill.runs.manifest import COMPLETE, CorruptCheckpoint, follow_umask, verify, write_manifest
from maedistill.runs.state import STATE, checkpoint_name, read_state, stated_step
from maedistill.training.engine import MOMENTS, Engine

WRITE_ERRORS = (OSError, SafetensorError)  # a full disk, a missing permission: what the user can fix
_NAME = re.compile(r"step_(\d{9})")


@dataclass(frozen=True)
class Snapshot:
    """The contents of a checkpoint: copies on the CPU, which training no longer touches."""

    step: int
    files: dict[str, dict[str, Tensor]]  # safetensors by file name
    texts: Mapping[str, str]  # state.json and other small files by name


def take_snapshot(
    *,
    step: int,
    engine: Engine,
    state: dict[str, Any],
    extra_networks: Mapping[str, nn.Module] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Snapshot | None:
    """Copy the contents of a checkpoint of `step` to rank 0; return None on the other ranks. Collective.

    state: plain JSON types, returned by `load_latest` (restore.py). extra_networks: networks beside the trained one, by
    file name. texts: small files by name.
    """
    training = engine.state()
    if training is None:
        return None
    document = json.dumps({"step": step, "engine": training.scalars, "loop": state}, indent=1, allow_nan=False)
    moments = {f"{kind}/{name}": value for kind in MOMENTS for name, value in training.moments[kind].items()}
    files = {"model.safetensors": training.weights, "optimizer.safetensors": moments}
    for kind, module in (extra_networks or {}).items():
        tensors = files[f"{kind}.safetensors"] = {}
        for name, value in module.state_dict().items():
            copy_to_main(tensors, name, value)
    return Snapshot(step, files, {STATE: document, **(texts or {})})


def write_snapshot(folder: Path, snapshot: Snapshot, *, keep: int) -> None:
    """Write a checkpoint, then prune older ones. An intact one of the same step stays as it is.

    keep: number of newest checkpoints that stay. Raises one of WRITE_ERRORS; older checkpoints are then untouched, and
    the partial one is removed to free its space.
    """
    assert keep >= 1
    final = folder / checkpoint_name(snapshot.step)
    make_folder(folder)
    remove_strays(folder)
    if not _is_intact(final):
        write_with_manifest(final, snapshot.files, snapshot.texts)
    # Later ones, damaged when the run resumed, stay.
    for _, path in sorted(old for old in checkpoint_steps(folder) if old[0] <= snapshot.step)[:-keep]:
        remove_with_manifest(path)


def write_with_manifest(final: Path, files: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> None:
    """Write a folder with a manifest under a temporary name, then rename it; an earlier folder is replaced.

    files: tensors by name, by the name of their safetensors file. Raises one of WRITE_ERRORS, and then leaves nothing.
    """
    temporary = final.with_name(f"{final.name}.tmp")
    try:
        temporary.mkdir()
        for name, tensors in files.items():
            save_file(dict(tensors), temporary / name)
            follow_umask(temporary / name)
        for name, text in texts.items():
            write_synced(temporary / name, text.encode())
        write_manifest(temporary)
        if final.exists():
            shutil.rmtree(final)  # damaged: the run resumed before it and reached this step again
        temporary.rename(final)
        sync(final.parent)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_strays(folder: Path) -> None:
    """Remove remains of checkpoints that a killed start wrote or removed. Only the owner of the run may do so."""
    for stray in folder.glob("step_*.tmp"):
        remove_with_manifest(stray)


def checkpoint_steps(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of every checkpoint in `folder` that was renamed into place, in no order."""
    try:
        names = os.listdir(folder) if os.path.isdir(folder) else []  # Path.is_dir raises for too long a name
    except FileNotFoundError:  # removed just now by the run that owns it
        names = []
    return [(int(match[1]), Path(folder, name)) for name in names if (match := _NAME.fullmatch(name))]


def latest_step(folder: Path) -> int | None:
    """Return the step of the newest checkpoint with a COMPLETE file, without reading it; None if there is none."""
    return max(
        (step for step, path in checkpoint_steps(folder) if (path / COMPLETE).is_file() and stated_step(path) == step),
        default=None,
    )


def require_intact(checkpoint: Path) -> None:
    """Raise CorruptCheckpoint unless the files match their manifest and are those of the step in the folder's name."""
    verify(checkpoint)
    read_state(checkpoint)


def whole_copy(folder: Path, name: str) -> Path | None:
    """Return the copy of a small file in the newest checkpoint that has one which matches its manifest."""
    for step, path in sorted(checkpoint_steps(folder), reverse=True):
        with suppress(CorruptCheckpoint):
            verify(path, only=name)
            if stated_step(path) == step:
                return path / name
    return None


def _is_intact(checkpoint: Path) -> bool:
    try:
        require_intact(checkpoint)
    except CorruptCheckpoint:
        return False
    return True


def remove_with_manifest(path: Path) -> None:
    """Remove such a folder, whole or partial. Failing to remove an old checkpoint must not fail a save."""
    try:
        shutil.rmtree(path if path.suffix == ".tmp" else path.rename(path.with_name(f"{path.name}.tmp")))
    except OSError as error:
        warn(f"{path} could not be removed ({error})")
