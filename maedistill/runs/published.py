"""Weights that a run publishes for other runs while it trains: one folder for each step, hashed, renamed into place.

    RUN/published/step_000000100/model.safetensors, manifest.json, COMPLETE

Only rank 0 calls these functions. Readers are other runs, on any machine that sees the folder.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from maedistill.durable import make_folder
from maedistill.errors import DataError
from maedistill.runs.checkpoint import WRITE_ERRORS, checkpoint_steps, remove_with_manifest, write_with_manifest
from maedistill.runs.manifest import COMPLETE, CorruptCheckpoint, verify
from maedistill.runs.state import checkpoint_name

PUBLISHED = "published"
_FILE = "model.safetensors"


def publish(run: Path, step: int, weights: Mapping[str, Tensor]) -> None:
    """Write the weights of a step, unless they are there. Raises DataError if the disk refuses them."""
    final = run / PUBLISHED / checkpoint_name(step)
    with suppress(CorruptCheckpoint):
        return verify(final)
    try:
        make_folder(final.parent)
        write_with_manifest(final, {_FILE: weights}, {})
    except WRITE_ERRORS as error:
        raise DataError(f"{final} cannot be written ({error})", "free some space, then start again") from error


def read_published(run: Path, step: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """Read the weights of a step to the CPU; None while they are not there.

    Raises DataError unless they are intact and have these names and shapes.
    """
    folder = run / PUBLISHED / checkpoint_name(step)
    if not (folder / COMPLETE).is_file():
        return None
    try:
        verify(folder)
        weights = load((folder / _FILE).read_bytes())  # not mapped: its run may remove the file
    except (CorruptCheckpoint, *WRITE_ERRORS) as problem:
        if not (folder / COMPLETE).is_file():
            return None  # its run went back to an earlier step just now, and will publish it again
        remedy = "start the same command again; if the file is damaged, start all these runs over (--fresh)"
        raise DataError(f"{folder} cannot be used: {problem}", remedy) from problem
    if {name: tuple(value.shape) for name, value in weights.items()} != dict(shapes):
        raise DataError(f"{folder} does not fit the network in {run}/run.json", "start all these runs over (--fresh)")
    return weights


def remove_published(run: Path, *, before: int = 0, after: int | None = None) -> None:
    """Remove what was published of steps below `before` or above `after`, and what a kill left half written."""
    folder = run / PUBLISHED
    for stray in folder.glob("step_*.tmp"):
        remove_with_manifest(stray)
    for step, path in checkpoint_steps(folder):
        if step < before or (after is not None and step > after):
            remove_with_manifest(path)
