"""The counters of a run, as a checkpoint keeps them, and the log of samples that could not be decoded."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from maedistill.config.schema import RunConfig
from maedistill.errors import DataError
from maedistill.escaping import shown
from maedistill.processes import distributed
from maedistill.runs.records import AppendOnlyFile

_MIN_SAMPLES = 10_000  # max_bad_fraction is taken of at least this many samples, so one bad image cannot end a run


@dataclass
class Progress:
    """How far a run is: exactly what a checkpoint keeps of its loop in state.json. All ranks hold the same values."""

    step: int = 0  # steps done
    bad_samples: int = 0  # samples replaced because they could not be decoded
    nonfinite: int = 0  # updates not applied because their loss or gradient was not finite
    nonfinite_in_a_row: int = 0
    trained_seconds: float = 0.0  # without saving, evaluating and drawing
    # {name: [sum, count]} of the losses since the last logged step, for a mean that a restart does not cut
    losses: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], *, checkpoints: Path) -> Self:
        """Restore the values of a checkpoint. Raises DataError if it has other keys or types than this version's."""
        own = asdict(cls())
        differing = sorted(name for name in own.keys() | state if type(state.get(name)) is not type(own.get(name)))
        if not differing and not all(_is_total(total) for total in state["losses"].values()):
            differing = ["losses"]
        if differing:
            raise DataError(
                f"the newest checkpoint in {checkpoints} was written by another version: its state differs in "
                f"{', '.join(differing)}",
                "continue with the version that the run began with, or use another run=",
            )
        return cls(**state)


class BadSampleLog:
    """Counts the samples that were replaced, and applies `data.max_bad_fraction`. path: the file that lists them."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.lines = AppendOnlyFile(path, unique=True)
        self.max_fraction, self.global_batch = config.data.max_bad_fraction, config.optim.global_batch
        self._new: list[str] = []

    def add(self, lines: Iterable[str]) -> None:
        """Remember bad samples of this rank, each as a line `NAME: why`."""
        self._new += map(shown, lines)

    def count(self, progress: Progress) -> None:
        """Write and count the new bad samples of all ranks. Collective. Raises DataError if they are too many."""
        new = [line for lines in distributed.gather_objects(self._new) for line in lines]
        if new and distributed.is_main():
            self.lines.append(*sorted(new))
        self._new = []
        progress.bad_samples += len(new)
        if progress.bad_samples > max_bad(progress.step * self.global_batch, self.max_fraction):
            raise DataError(
                f"{progress.bad_samples} bad samples, more than data.max_bad_fraction={self.max_fraction:g} allows",
                f"see {self.lines.path}; repair the shards or raise the limit",
            )


def max_bad(samples: int, fraction: float) -> float:
    """Return how many of this number of samples may be undecodable, for a `data.max_bad_fraction`."""
    return fraction * max(_MIN_SAMPLES, samples)


def _is_total(total: object) -> bool:
    """Return whether this is a sum and a count."""
    return isinstance(total, list) and [type(number) for number in total] == [float, float]
