"""Timing of steps on the device: many in a row, interleaved with the steps they are compared with."""

import itertools
import time
from collections.abc import Mapping

from torch import nn

from gpu_parts.check import Check
from maedistill.benchmark.step import peak_memory
from maedistill.benchmark.timing import interleave, repeated
from maedistill.benchmark.training_step import TrainingStep
from maedistill.evaluation.latency import seconds_of

_ROUNDS, _SECONDS, _WARM = 3, 0.6, 3  # rounds, least seconds that a round takes, uncounted first steps


def warm_up(check: Check, step: TrainingStep) -> float:
    """Run the first steps, in which kernels are chosen and compiled; return the seconds they take."""
    return seconds_of(step, check.device, repeats=_WARM)


def rates(check: Check, steps: Mapping[str, TrainingStep], *, batch: int) -> dict[str, tuple[float, ...]]:
    """Measure images/s of warmed-up steps in turn, so that other load on the machine slows all of them alike."""
    seconds = 0.0 if check.tiny else _SECONDS
    paths = {name: repeated(step, check.device, images=batch, seconds=seconds) for name, step in steps.items()}
    measured = interleave(paths, rounds=1 if check.tiny else _ROUNDS, warm_up=0)
    return {name: rate.wall for name, rate in measured.items()}


def queue_seconds(check: Check, step: TrainingStep) -> float:
    """Return the seconds that the host is busy with a step: the median of three, each started on an idle device."""
    spent = []
    for _ in range(3):
        check.wait()
        start = time.perf_counter()
        step()
        spent.append(time.perf_counter() - start)
    check.wait()
    return sorted(spent)[1]


def memory_gb(check: Check, step: TrainingStep, *, method: nn.Module, teacher: nn.Module | None) -> float:
    """Return the GB that a run of this step needs: weights, both moments of AdamW, teacher, and the step's peak."""
    tensors = itertools.chain(teacher.parameters(), teacher.buffers()) if teacher is not None else ()
    held = 3 * sum(parameter.nbytes for parameter in method.parameters()) + sum(tensor.nbytes for tensor in tensors)
    return (held + peak_memory(step, check.device)) / 1e9
