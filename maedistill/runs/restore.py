"""Reading checkpoints: the newest intact one into a run, or the weights of a single one. checkpoint.py has the format.

    RUN/checkpoints -> newest_intact -> load_latest -> engine, moving average, the loop's state
    checkpoint folder -> read_weights -> tensors by name

Rank 0 takes the newest folder whose COMPLETE, sizes and checksums match and whose counters are possible ones of the
step in its name. It warns of each newer one that is damaged, or a copy under another name, passes it over, and sends
the tensors to the other ranks. If there are folders but none is intact, that is an error, never a silent fresh start.
A folder loads completely or raises DataError, whatever it contains.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor, nn

from maedistill.errors import DataError
from maedistill.escaping import warn
from maedistill.processes.distributed import broadcast_tensor, on_main
from maedistill.runs.checkpoint import WRITE_ERRORS, checkpoint_steps, require_intact
from maedistill.runs.manifest import CorruptCheckpoint, read_manifest, verify
from maedistill.runs.state import read_state
from maedistill.training.engine import MOMENTS, Engine, TrainingState


def load_latest(
    folder: Path, engine: Engine, *, extra_networks: Mapping[str, nn.Module] | None = None
) -> dict[str, Any] | None:
    """Load the newest intact checkpoint into these networks; return its state, None if there is none.

    Collective. extra_networks: networks beside the engine's, by file name.

    Raises DataError when there are checkpoints but no intact one, or when it belongs to another model.
    """
    shapes = engine.shapes()
    parameters = [name for name, _ in engine.module.named_parameters()]
    training: TrainingState | None = None  # this and the next are read on rank 0 only
    others = extra_networks or {}
    tensors_of: dict[str, dict[str, Tensor]] = {kind: {} for kind in others}

    def read() -> dict[str, Any] | None:
        nonlocal training
        checkpoint = newest_intact(Path(folder))
        if checkpoint is None:
            return None
        scalars, state = read_state(checkpoint)
        weights = _read_tensors(checkpoint, "model", shapes)
        keys = {f"{moment}/{name}": shapes[name] for moment in MOMENTS for name in parameters}
        tensors = _read_tensors(checkpoint, "optimizer", keys)
        moments = {moment: {name: tensors[f"{moment}/{name}"] for name in parameters} for moment in MOMENTS}
        training = TrainingState(weights, moments, scalars)
        for kind, module in others.items():
            own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
            tensors_of[kind] = _read_tensors(checkpoint, kind, own)
        return state

    state = on_main(read)
    if state is not None:
        engine.load_state(training)
        for kind, module in others.items():
            for name, value in module.state_dict().items():
                value.copy_(broadcast_tensor(tensors_of[kind].get(name), value.shape, dtype=value.dtype))
    return state


def newest_intact(folder: Path) -> Path | None:
    """Return the newest intact checkpoint, None without any. Raises DataError if all are damaged."""
    skipped: list[tuple[Path, CorruptCheckpoint]] = []
    for _, path in sorted(checkpoint_steps(folder), reverse=True):
        try:
            require_intact(path)
        except CorruptCheckpoint as problem:
            skipped.append((path, problem))
            continue
        for other, why in skipped:
            warn(f"checkpoint {other} is damaged ({why}): skipped")
        return path
    if skipped:
        damaged = ", ".join(f"{other.name} ({why})" for other, why in skipped)
        raise DataError(
            f"no checkpoint in {folder} is intact: {damaged}",
            "restore one from a copy, or start over in another run folder",
        )
    return None


def read_weights(checkpoint: Path, kind: Literal["model", "ema"] = "model") -> dict[str, Tensor]:
    """Read the weights of one checkpoint folder, or their moving average, to the CPU; no engine is needed."""
    file = f"{kind}.safetensors"
    try:
        verify(checkpoint, only=file)
    except CorruptCheckpoint as problem:
        raise _unusable(checkpoint / file, problem) from problem
    return _load(checkpoint / file)


def _read_tensors(checkpoint: Path, kind: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read a file of tensors. Raises DataError unless names and shapes are those of the module."""
    if f"{kind}.safetensors" not in read_manifest(checkpoint):
        raise DataError(f"{checkpoint} has no {kind} weights", "continue with the settings the run began with")
    tensors = _load(checkpoint / f"{kind}.safetensors")
    stored = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name in stored.keys() | shapes.keys() if stored.get(name) != shapes.get(name))
    if wrong:
        name = wrong[0]
        raise DataError(
            f"{checkpoint} belongs to another model: {len(wrong)} tensors differ, first {name}: "
            f"{stored.get(name, 'missing')} in {kind}.safetensors, {shapes.get(name, 'missing')} in the model",
            "continue with the settings the run began with, or choose another run folder",
        )
    return tensors


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except WRITE_ERRORS as error:  # reading raises the same two kinds
        raise _unusable(path, error) from error


def _unusable(path: Path, problem: Exception) -> DataError:
    return DataError(f"{path} cannot be used: {problem}", "name another checkpoint, or copy it again")
