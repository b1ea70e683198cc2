"""Hooks of a run, for a caller's own code: trackers, schedules, access to the network during training."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from maedistill.config.schema import RunConfig
from maedistill.runs.folder import RunFolder


class RunState(Protocol):
    """What a hook may read of the run. module: what is trained, the student in it. folder.path: the run folder."""

    config: RunConfig
    module: nn.Module
    folder: RunFolder

    @property
    def step(self) -> int:
        """Return the optimizer steps done."""

    @property
    def epoch(self) -> float:
        """Return the epochs done."""


class Callback:
    """Three hooks, which do nothing here: derive a class and define those that you need.

    An exception in a hook ends the run like any other. A hook must not change the random state, or a restart would not
    repeat the run; restarted runs call `on_step` again for steps after their checkpoint.
    """

    def on_start(self, run: RunState) -> None:
        """Act once per start, on every rank, before the first step and after the checkpoint is restored."""

    def on_step(self, run: RunState) -> None:
        """Act after every optimizer step, on every rank. Reading a tensor's value here makes a GPU wait."""

    def on_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Act on each line of metrics.jsonl, on rank 0: losses and speed, kNN, validation accuracy."""
