"""A tracker shows a run while it trains. What each one gets, and the names that all of them use."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from maedistill.config.document import read_file

End = Literal["finished", "killed", "failed"]
_OF_THE_MACHINE = {"images_per_second", "data_wait", "memory_gb", "eta_seconds", "trained_seconds"}


@dataclass(frozen=True)
class Opening:
    """The run that a tracker shows, and the data that it gets.

    first_step: this start resumes there. id: of the run in the tracker, None at first. written: the newest step of each
    tag in metrics.jsonl; those after first_step will come again.
    """

    folder: Path
    first_step: int
    id: str | None
    written: Mapping[str, int]

    @property
    def settings(self) -> dict[str, Any]:
        """Return the run's settings by dotted name. What is no number is text."""
        config = self.folder / "config.yaml"
        return {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, (value, _) in (read_file(config).items() if config.is_file() else ())
        }


class Tracker(Protocol):
    """One tracker, open. last: the newest step of each tag that it has."""

    last: dict[str, int]

    @property
    def id(self) -> str | None:
        """Return the id of the run there, None if it needs none."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers by tag."""

    def picture(self, step: int, name: str, pixels: Any) -> None:
        """Take an image, uint8 [H, W, 3]."""

    def close(self, end: End) -> None:
        """Take what is left, and how this start ended."""


def scalars_of(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line by tag: sys/ for the machine, train/ for training, val/ for evaluations."""
    kind = "train" if "loss" in values else "val"
    return {
        f"{'sys' if name in _OF_THE_MACHINE else kind}/{name}": value
        for name, value in values.items()
        if isinstance(value, int | float) and name != "step"
    }
