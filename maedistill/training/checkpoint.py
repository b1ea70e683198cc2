"""Checkpoints as folders of safetensors and JSON: nothing to unpickle, free of rank count and ZeRO stage.

    RUN/checkpoints/step_000000123/
        model.safetensors       parameters and persistent buffers by name, fp32
        optimizer.safetensors   "exp_avg/NAME" and "exp_avg_sq/NAME"
        ema.safetensors         the averaged weights, where the run has them
        state.json              the engine's scalars and the loop's plain state
        manifest.json, COMPLETE what proves the files above whole, see seal.py

Saving: all ranks gather, rank 0 alone writes into `step_N.tmp`, syncs every file, then the folder, renames it to
`step_N` and syncs the parent. The rename is the one instant at which the checkpoint begins to exist: what is killed
before it leaves a `.tmp`, which nobody reads and the next save removes. COMPLETE lets a reader trust a folder that was
copied by something other than a rename. Old checkpoints go only after the new one stands, renamed to `.tmp` first.

Loading: rank 0 takes the newest folder whose COMPLETE, sizes and checksums hold, warns of each damaged one it passes
over, and sends the tensors to the others. Folders of which none is intact are an error, never a silent fresh start.
Whatever a folder holds, it loads whole or raises DataError.
"""

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import Tensor

from maedistill.errors import DataError
from maedistill.training.distributed import copy_to_main, from_main, on_main
from maedistill.training.engine import Engine
from maedistill.training.seal import COMPLETE, Damage, listed, read_json, seal, sync, verify, write_synced
from maedistill.training.state import MOMENTS, TrainingState

logger = logging.getLogger(__name__)

WRITE_ERRORS = (OSError, SafetensorError)  # a full disk, a missing permission: what a person can mend
STATE = "state.json"
_NAME = re.compile(r"step_(\d{9})")

Shapes = dict[str, tuple[int, ...]]


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

    state: plain JSON types, handed back by `load_latest`.
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
    final = folder / f"step_{snapshot.step:09d}"
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


def save_checkpoint(
    folder: Path, *, step: int, engine: Engine, state: dict[str, Any], keep: int, ema: ModelEmaV3 | None = None
) -> Path:
    """Collective. Writes a checkpoint while everybody waits; returns its folder. A training run has a `Saver`.

    Raises DataError on every rank when it could not be written; earlier checkpoints are untouched then.
    """
    snapshot = take_snapshot(step=step, engine=engine, state=state, ema=ema)

    def write() -> Path:
        try:
            return write_snapshot(Path(folder), snapshot, keep=keep)
        except WRITE_ERRORS as error:
            raise failed_write(folder, step, error) from error

    return on_main(write)


def failed_write(folder: Path, step: int, error: Exception) -> DataError:
    """One of WRITE_ERRORS, said to the person who can mend it."""
    last = latest_step(folder)
    stands = "there is none before it" if last is None else f"that of step {last} stands"
    return DataError(
        f"saving the checkpoint of step {step} in {folder} failed ({error}); {stands}",
        "make room or mend the permissions there; starting the same command again continues the run",
    )


def load_latest(folder: Path, engine: Engine, ema: ModelEmaV3 | None = None) -> dict[str, Any] | None:
    """Collective. Puts the newest intact checkpoint into `engine` and `ema`; returns its state, None if there is none.

    Raises DataError when there are checkpoints but no intact one, or when it belongs to another model.
    """
    shapes = engine.shapes()
    parameters = [name for name, _ in engine.module.named_parameters()]
    box: list[tuple[TrainingState, dict[str, Tensor]]] = []  # stays empty but on rank 0

    def read() -> dict[str, Any] | None:
        checkpoint = newest_intact(Path(folder))
        if checkpoint is None:
            return None
        scalars, state = _read_state(checkpoint)
        weights, moments = _read_tensors(checkpoint, "model", shapes), _read_moments(checkpoint, shapes, parameters)
        averaged = {} if ema is None else _read_tensors(checkpoint, "ema", shapes)
        box.append((TrainingState(weights, moments, scalars), averaged))
        return state

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
        try:
            verify(path)
            return path
        except Damage as problem:
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
    try:
        verify(checkpoint, only=file)
    except Damage as problem:
        raise _unusable(checkpoint / file, problem) from problem
    return _load(checkpoint / file)


def _read_state(checkpoint: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """The engine's scalars and the loop's state."""
    try:
        if STATE not in listed(checkpoint):
            raise Damage("the checkpoint has no such file")
        document = read_json(checkpoint / STATE)
        scalars, state = document.get("engine"), document.get("loop")
        if document.get("step") != int(_NAME.fullmatch(checkpoint.name)[1]):
            raise Damage("it belongs to another step")
        if not isinstance(state, dict) or not isinstance(scalars, dict):
            raise Damage("it does not say what the engine and the loop were at")
        if not all(type(value) in (int, float) and abs(value) < 2**63 for value in scalars.values()):
            raise Damage("the engine's scalars are no numbers")
    except Damage as problem:
        raise _unusable(checkpoint / STATE, problem) from problem
    return scalars, state


def _read_moments(checkpoint: Path, shapes: Shapes, parameters: list[str]) -> dict[str, dict[str, Tensor]]:
    expected = {f"{kind}/{name}": shapes[name] for kind in MOMENTS for name in parameters}
    found = _read_tensors(checkpoint, "optimizer", expected)
    return {kind: {name: found[f"{kind}/{name}"] for name in parameters} for kind in MOMENTS}


def _read_tensors(checkpoint: Path, kind: Literal["model", "ema", "optimizer"], shapes: Shapes) -> dict[str, Tensor]:
    """A file of tensors that fit the module: the same names and shapes."""
    if f"{kind}.safetensors" not in listed(checkpoint):
        raise DataError(f"{checkpoint} has no {kind} weights", "continue with the settings the run began with")
    tensors = _load(checkpoint / f"{kind}.safetensors")
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
    if wrong:
        name = wrong[0]
        raise DataError(
            f"{checkpoint} belongs to another model: {len(wrong)} tensors differ, first {name}: "
            f"{found.get(name, 'missing')} in {kind}.safetensors, {shapes.get(name, 'missing')} in the model",
            "continue with the settings the run began with, or choose another run folder",
        )
    return tensors


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except WRITE_ERRORS as error:  # the same two kinds when reading
        raise _unusable(path, error) from error


def _unusable(path: Path, problem: Exception) -> DataError:
    return DataError(f"{path} cannot be used: {problem}", "name another checkpoint, or copy it again")


def _is_intact(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except Damage:
        return False
    return True


def _prune(folder: Path, step: int, keep: int, keep_every: float | None) -> None:
    """Removes what is older than the newest `keep` up to `step`. Later ones, which a damaged run left, stay."""
    steps = sorted(old for old in _steps(folder) if old[0] <= step)
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


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that was renamed into place, in no order."""
    entries = Path(folder).iterdir() if os.path.isdir(folder) else ()  # Path.is_dir fails for a name too long
    return [(int(match[1]), path) for path in entries if (match := _NAME.fullmatch(path.name))]
