"""Checkpoints as folders of safetensors and JSON: nothing to unpickle, free of rank count and ZeRO stage.

    RUN/checkpoints/step_000000123/
        model.safetensors       parameters and persistent buffers by name, fp32
        optimizer.safetensors   "exp_avg/NAME" and "exp_avg_sq/NAME"
        ema.safetensors         the averaged weights, where the run has them
        state.json              the engine's scalars and the loop's plain state
        manifest.json           size and sha256 of each file above
        COMPLETE                sha256 of manifest.json, written last

Saving: all ranks gather, rank 0 alone writes into `step_N.tmp`, syncs every file, then the folder, renames it to
`step_N` and syncs the parent. The rename is the one instant at which the checkpoint begins to exist: what is killed
before it leaves a `.tmp`, which nobody reads and the next save removes. COMPLETE lets a reader trust a folder that was
copied by something other than a rename. Old checkpoints go only after the new one stands, renamed to `.tmp` first.

Loading: rank 0 takes the newest folder whose COMPLETE, sizes and checksums hold, warns of each damaged one it passes
over, and sends the tensors to the others. Folders of which none is intact are an error, never a silent fresh start.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import Tensor

from maedistill.errors import DataError
from maedistill.training.distributed import copy_to_main, from_main, on_main
from maedistill.training.engine import Engine
from maedistill.training.state import MOMENTS, TrainingState

logger = logging.getLogger(__name__)

MANIFEST, COMPLETE, STATE = "manifest.json", "COMPLETE", "state.json"
_NAME = re.compile(r"step_(\d{9})")


def save_checkpoint(
    folder: Path, *, step: int, engine: Engine, state: dict[str, Any], keep: int, ema: ModelEmaV3 | None = None
) -> Path:
    """Collective. Writes the checkpoint of `step` and keeps the newest `keep` up to it; returns its folder.

    state: plain JSON types, handed back by `load_latest`. An intact checkpoint of the same step is left as it is.
    Raises DataError on every rank when it could not be written; earlier checkpoints are untouched then.
    """
    assert keep >= 1
    training = engine.state()
    files: dict[str, dict[str, Tensor]] = {}
    if training is not None:
        moments = {f"{kind}/{name}": value for kind in MOMENTS for name, value in training.moments[kind].items()}
        files = {"model.safetensors": training.weights, "optimizer.safetensors": moments}
        if ema is not None:
            files["ema.safetensors"] = {}
            for name, value in ema.module.state_dict().items():
                copy_to_main(files["ema.safetensors"], name, value)

    def write() -> Path:
        document = {"step": step, "engine": training.scalars, "loop": state}
        return _write(Path(folder), step, files, json.dumps(document, indent=1, allow_nan=False), keep)

    return on_main(write)


def load_latest(folder: Path, engine: Engine, ema: ModelEmaV3 | None = None) -> dict[str, Any] | None:
    """Collective. Puts the newest intact checkpoint into `engine` and `ema`; returns its state, None if there is none.

    Raises DataError when there are checkpoints but no intact one, or when it belongs to another model.
    """
    shapes = engine.shapes()
    box: list[tuple[TrainingState, dict[str, Tensor]]] = []  # stays empty but on rank 0

    def read() -> dict[str, Any] | None:
        checkpoint = newest_intact(Path(folder))
        if checkpoint is None:
            return None
        document = json.loads((checkpoint / STATE).read_text())
        box.append((_read_training(checkpoint, shapes, document["engine"]), {}))
        if ema is not None:
            box[0][1].update(_checked(checkpoint, "ema", shapes))
        return document["loop"]

    state = on_main(read)
    if state is not None:
        training, averaged = box[0] if box else (None, {})
        engine.load_state(training)
        for name, value in ema.module.state_dict().items() if ema is not None else ():
            value.copy_(from_main(averaged.get(name), value.shape, dtype=value.dtype))
    return state


def latest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint that says it is complete, without reading it; None if there is none."""
    return max((step for step, path in _steps(folder) if (path / COMPLETE).is_file()), default=None)


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint whose checksums hold; None if there is none at all; DataError if all are damaged."""
    damaged = []
    for _, path in sorted(_steps(folder), reverse=True):
        problem = _damage(path)
        if problem is None:
            return path
        damaged.append(path.name)
        logger.warning("checkpoint %s is damaged (%s): passed over", path, problem)
    if damaged:
        raise DataError(
            f"no checkpoint in {folder} is intact: {', '.join(damaged)}",
            "restore one from a copy, or start over in another run folder",
        )
    return None


def read_weights(checkpoint: Path, kind: Literal["model", "ema"] = "model") -> dict[str, Tensor]:
    """The weights, or their moving average, of one checkpoint folder by name, on the CPU; no engine needed."""
    file = f"{kind}.safetensors"
    problem = _damage(checkpoint, only=file)
    if problem is not None:
        raise DataError(f"{checkpoint / file} cannot be used: {problem}", "name another checkpoint, or copy it again")
    return load_file(checkpoint / file)


def _write(folder: Path, step: int, files: dict[str, dict[str, Tensor]], document: str, keep: int) -> Path:
    """Rank 0's part of a save: write, sync, rename, prune."""
    final = folder / f"step_{step:09d}"
    temporary = folder / f"{final.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stray in folder.glob("step_*.tmp"):
            shutil.rmtree(stray)
        if final.exists() and _damage(final) is None:
            return final
        temporary.mkdir()
        for name, tensors in files.items():
            save_file(tensors, temporary / name)
        (temporary / STATE).write_text(document)
        _seal(temporary)
        if final.exists():
            shutil.rmtree(final)  # damaged: the run went back behind it and has come here again
        temporary.rename(final)
        _sync(folder)
        _prune(folder, step, keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # gives the space back
        raise DataError(
            f"saving the checkpoint of step {step} in {folder} failed: {error}",
            "make room or mend the permissions there, then start the same command again: it continues",
        ) from error
    return final


def _seal(checkpoint: Path) -> None:
    """Makes the files durable and writes what proves them whole."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(checkpoint.iterdir())
    }
    (checkpoint / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=1))
    for name in (*files, MANIFEST):
        _sync(checkpoint / name)
    (checkpoint / COMPLETE).write_text(_sha256(checkpoint / MANIFEST))
    _sync(checkpoint / COMPLETE)
    _sync(checkpoint)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Removes what is older than the newest `keep` up to `step`. Later ones, which a damaged run left, stay."""
    for _, path in sorted((old for old in _steps(folder) if old[0] <= step), reverse=True)[keep:]:
        shutil.rmtree(path.rename(path.with_name(f"{path.name}.tmp")))


def _damage(checkpoint: Path, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint (or with one of its files), in words; None if it is intact."""
    manifest, complete = checkpoint / MANIFEST, checkpoint / COMPLETE
    if not complete.is_file() or not manifest.is_file():
        return f"{COMPLETE if manifest.is_file() else MANIFEST} is missing"
    if complete.read_text() != _sha256(manifest):
        return f"{MANIFEST} does not match {COMPLETE}"
    files = json.loads(manifest.read_text())["files"]
    if only is not None and only not in files:
        return "the checkpoint has no such file"
    for name in files if only is None else (only,):
        path, expected = checkpoint / name, files[name]
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            return f"{name} is missing or has another size"
        if _sha256(path) != expected["sha256"]:
            return f"{name} has another checksum"
    return None


def _read_training(checkpoint: Path, shapes: dict[str, tuple[int, ...]], scalars: dict[str, float]) -> TrainingState:
    moments: dict[str, dict[str, Tensor]] = {kind: {} for kind in MOMENTS}
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        kind, _, name = key.partition("/")
        moments[kind][name] = value
    return TrainingState(_checked(checkpoint, "model", shapes), moments, scalars)


def _checked(checkpoint: Path, kind: Literal["model", "ema"], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that fit the module: the same names and shapes."""
    if not (checkpoint / f"{kind}.safetensors").is_file():
        raise DataError(f"{checkpoint} has no {kind} weights", "continue with the settings the run began with")
    weights = load_file(checkpoint / f"{kind}.safetensors")
    found = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
    if wrong:
        name = wrong[0]
        raise DataError(
            f"{checkpoint} belongs to another model: {len(wrong)} tensors differ, first {name}: "
            f"{found.get(name, 'missing')} in the file, {shapes.get(name, 'missing')} in the model",
            "continue with the settings the run began with, or choose another run folder",
        )
    return weights


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that was renamed into place, in no order."""
    entries = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return [(int(match[1]), path) for path in entries if (match := _NAME.fullmatch(path.name))]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Forces a file or a folder's entries to the disk: a rename alone survives a kill, not a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
