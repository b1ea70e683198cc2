"""The counters of a run's loop: exactly what a checkpoint keeps of it in state.json."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from maedistill.errors import DataError


@dataclass
class Progress:
    """How far a run is. All ranks hold the same values."""

    step: int = 0  # steps done
    bad_samples: int = 0  # samples replaced because they could not be decoded
    nonfinite: int = 0  # updates not applied because their loss or gradient was not finite
    nonfinite_in_a_row: int = 0
    trained_seconds: float = 0.0  # without saving, evaluating and drawing

    def state(self) -> dict[str, int | float]:
        """Return the values that a checkpoint keeps."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], *, checkpoints: Path) -> Self:
        """Restore the values of a checkpoint. Raises DataError if it has other keys or types than this version's."""
        known = cls().state()
        differing = sorted(name for name in known | state if type(state.get(name)) is not type(known.get(name)))
        if differing:
            raise DataError(
                f"the newest checkpoint in {checkpoints} is of another version: its state differs in "
                f"{', '.join(differing)}",
                "continue with the version that the run began with, or use another run=",
            )
        return cls(**state)
