"""The weight of a distillation term over time: a pure function of the epoch, and its table for a whole run.

weight |        ______________
       |       /              |
     0 |______/               |______
        start  +warmup       stop     epochs
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from maedistill.config.distill import TermConfig


def weight_at(term: TermConfig, epoch: float) -> float:
    """Return the weight in the step that begins after `epoch` epochs."""
    if epoch < term.start_epoch or (term.stop_epoch is not None and epoch >= term.stop_epoch):
        return 0.0
    if epoch >= term.start_epoch + term.warmup_epochs:
        return term.weight
    return term.weight * (epoch - term.start_epoch) / term.warmup_epochs


def is_scheduled(term: TermConfig) -> bool:
    """Return whether the weight changes over time."""
    return bool(term.start_epoch or term.warmup_epochs) or term.stop_epoch is not None


def describe_schedule(term: TermConfig) -> str:
    """Return a summary: `9 from epoch 5, warm-up 20, to epoch 100`."""
    start = f" from epoch {term.start_epoch:g}" if term.start_epoch else ""
    warmup = f", warm-up {term.warmup_epochs:g}" if term.warmup_epochs else ""
    stop = f", to epoch {term.stop_epoch:g}" if term.stop_epoch is not None else ""
    return f"{term.weight:g}{start}{warmup}{stop}"


def weight_table(terms: Sequence[TermConfig], *, steps: int, epoch_at: Callable[[int], float]) -> Tensor:
    """Return the weight of each term at each step: float32 [steps, terms].

    A compiled step takes a row of this table, on the device, as input: it neither waits for the host nor recompiles.
    """
    rows = [[weight_at(term, epoch_at(step)) for term in terms] for step in range(steps)]
    return torch.tensor(rows, dtype=torch.float32).view(steps, len(terms))
