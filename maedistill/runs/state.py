"""state.json of a checkpoint: its step, the engine's scalars and the loop's counters, each checked before its use."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from maedistill.runs.manifest import CorruptCheckpoint, read_json, read_manifest
from maedistill.training.engine import LossScale

STATE = "state.json"
# Smallest and largest value by name. Other numbers count something: from 0 to what a float holds exactly.
_COUNT = (0.0, 2.0**53)
_BOUNDS = {
    "engine.scale": (sys.float_info.min, 2.0**127),
    "engine.finite_updates": (0.0, LossScale.growth_interval - 1.0),
    "loop.losses": (-sys.float_info.max, sys.float_info.max),  # sums, and how many numbers are in them
}


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:09d}"


def read_state(checkpoint: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the engine's scalars and the loop's state.

    Raises CorruptCheckpoint if they are of another step than the folder's name says, or have an impossible number.
    """
    if STATE not in read_manifest(checkpoint):
        raise CorruptCheckpoint(f"{STATE} is missing")
    document = read_json(checkpoint / STATE)
    scalars, state = document.get("engine"), document.get("loop")
    if type(document.get("step")) is not int or checkpoint.name != checkpoint_name(document["step"]):
        raise CorruptCheckpoint(f"{STATE} belongs to another step")
    if not isinstance(state, dict) or not isinstance(scalars, dict):
        raise CorruptCheckpoint(f"{STATE} does not say what the engine and the loop were at")
    if state.get("step", document["step"]) != document["step"]:
        raise CorruptCheckpoint(f"{STATE} has a loop that was at another step")
    if not all(type(value) in (int, float) for value in scalars.values()):
        raise CorruptCheckpoint(f"{STATE} has scalars of the engine that are no numbers")
    for name, value in _numbers({"engine": scalars, "loop": state}):
        smallest, largest = next((_BOUNDS[known] for known in _BOUNDS if name.startswith(known)), _COUNT)
        if not smallest <= value <= largest:
            raise CorruptCheckpoint(f"{STATE} says {name} is {str(value)[:30]}, which no run comes to")
    return scalars, state


def stated_step(checkpoint: Path) -> int | None:
    """Return the step that state.json names, whatever the folder is called; None if it cannot be read."""
    with suppress(CorruptCheckpoint):
        step = read_json(checkpoint / STATE).get("step")
        return step if type(step) is int else None
    return None


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number in a JSON value with its dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int | float):
        yield name, value
