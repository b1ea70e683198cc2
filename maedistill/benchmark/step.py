"""`benchmark step`: speed, FLOPs, memory and time shares of an optimizer step, compared with the plain version.

config -> StepComparison -> FLOPs counted, memory, steps interleaved, shares of time -> Report
"""

import itertools
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from maedistill.benchmark.plain_step import StepComparison
from maedistill.benchmark.report import Report, Row
from maedistill.benchmark.timing import interleave, ratio, repeated, spread
from maedistill.benchmark.training_step import TrainingStep
from maedistill.config.pretrain import PretrainConfig
from maedistill.evaluation.latency import seconds_of, synchronize
from maedistill.machine import DTYPES
from maedistill.processes import distributed
from maedistill.runs.checkpoint import Snapshot, take_snapshot
from maedistill.runs.start import join
from maedistill.training.compilation import should_compile
from maedistill.training.engine import Engine, shutdown_distributed

_SAVES = 5
_ROUND_SECONDS = 0.5  # a round repeats a step for this long
PLAIN, PUBLISHED = "plain", "plain, published decoder"
OURS, COMPILED, ENGINE = "ours", "ours, compiled", "ours, DeepSpeed engine"
SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192, 16384)}  # of the matrices whose product is the peak


def measure_step(config: PretrainConfig, *, batch: int | None, rounds: int) -> Report:
    """Measure steps of `batch` images; None: as many as take at most a second, at most engine.micro_batch.

    Opens a process group of one for the engine, and closes it. Raises ConfigError for a number format that the machine
    does not support, and for a teacher that cannot be built.
    """
    join(config)
    try:
        comparison = StepComparison(config, distributed.device())
        steps = {PLAIN: comparison.plain_step(), OURS: comparison.bare_step()}
        if batch:
            comparison.set_batch_size(batch)
        else:
            comparison.autotune_batch(steps[OURS])
        return _compare(comparison, steps, rounds=rounds)
    finally:
        shutdown_distributed()


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that `work` has allocated at once, beyond what was in use before."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reports its own start and end on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes), default=0)


def matrix_peak(dtype: torch.dtype, device: torch.device, sides: Sequence[int] = ()) -> tuple[float, int]:
    """Return the FLOP per second of the fastest square product, a bound for any step, and its side.

    sides: those that are tried, by default `SIDES` of the device.
    """

    def speed(side: int) -> float:
        left, right, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
        product, repeats = partial(torch.matmul, left, right, out=out), 1
        while seconds_of(product, device, repeats=repeats) < 0.1:
            repeats *= 2
        return repeats * 2 * side**3 / min(seconds_of(product, device, repeats=repeats) for _ in range(6))

    return max((speed(side), side) for side in sides or SIDES[device.type])


def _compare(comparison: StepComparison, steps: dict[str, TrainingStep], *, rounds: int) -> Report:
    """Build all tables. Memory is measured before the other steps are built, which would occupy some of it."""
    device, settings, batch = comparison.device, comparison.config.engine, comparison.batch
    losses = {name: _loss(step, steps[OURS]) for name, step in steps.items()}
    memory = {name: _memory(step, device) / batch / 1e6 for name, step in steps.items()}
    gflop = {PLAIN: comparison.count_gflop(comparison.plain_method, comparison.plain_teacher)}
    gflop[OURS] = comparison.count_gflop(comparison.method, comparison.teacher)
    if (published := comparison.published_method()) is not None:
        gflop[PUBLISHED] = comparison.count_gflop(published, comparison.plain_teacher)
        steps[PUBLISHED] = comparison.plain_step(published)
    best = OURS
    if should_compile(settings.compile, device, zero=settings.zero):
        best, steps[COMPILED] = COMPILED, comparison.bare_step(compiled=True)
    steps[ENGINE] = comparison.engine_step()
    peak, side = matrix_peak(DTYPES[comparison.precision], device)
    paths = {name: repeated(step, device, images=batch, seconds=_ROUND_SECONDS) for name, step in steps.items()}
    rates = {name: rate.wall for name, rate in interleave(paths, rounds=rounds).items()}
    shares = {name: _shares(steps[name], device, seconds=rounds * _ROUND_SECONDS) for name in (PLAIN, best)}
    speeds: list[Row] = []
    for name, rounds_of_step in rates.items():
        flop = 1e9 * gflop.get(name, gflop[OURS])["total"]  # per image
        mfu = spread([rate * flop / peak for rate in rounds_of_step])
        bases = [base for base in dict.fromkeys((PLAIN, PUBLISHED, OURS, best)) if base in rates]
        times = {f"x {base}": ratio(rounds_of_step, rates[base]) for base in bases}
        speeds.append({"step": name, "images/s": spread(rounds_of_step), "MFU": mfu, **times})
    tables = {
        f"steps of {batch} images, {comparison.precision}": speeds,
        "GFLOP per image, counted": _side_by_side(gflop),
        "share of time": _side_by_side(shares),
        "MB per image, most that forward and backward pass allocate at once": [dict(memory)],
        "a checkpoint, written while training goes on": [_checkpoint(steps[ENGINE], device)],
    }
    remarks = [
        f"plain: the step as published loops write it, in {comparison.plain_precision}, see benchmark/plain_step.py",
        f"loss of the same images and masks: {losses[PLAIN]:.6f} plain, {losses[OURS]:.6f} ours",
        f"MFU: counted FLOPs against {peak / 1e9:,.1f} GFLOP/s, the fastest square matrix product here (side {side})",
        f"images are synthetic, and nothing waits for data; teacher: {comparison.config.teacher.source or 'none'}",
    ]
    return Report(tables, remarks)


@torch.no_grad()
def _loss(step: TrainingStep, ours: TrainingStep) -> float:
    """Return the loss of `step` on the images and masks that `ours` draws."""
    images, split = ours.draw()
    target = step.teacher(images, split) if step.teacher is not None else None
    return step.losses(images, split, target)["loss"].item()


def _memory(step: TrainingStep, device: torch.device) -> int:
    """Return the peak bytes of forward and backward pass, beside weights, gradients and the optimizer's moments."""
    deque(step.gradients(), maxlen=0)  # allocates the gradients
    peak = peak_memory(lambda: deque(step.gradients(), maxlen=0), device)
    step()  # frees them again
    return peak


def _shares(step: TrainingStep, device: torch.device, *, seconds: float) -> dict[str, float]:
    """Return each part's share of the time of steps that wait for the device after each part."""
    spent: dict[str, float] = defaultdict(float)
    synchronize(device)
    start = last = time.perf_counter()
    while last - start < seconds:
        for part in step.parts():
            synchronize(device)
            now = time.perf_counter()
            spent[part] += now - last
            last = now
    return {part: share / (last - start) for part, share in spent.items()}


def _checkpoint(step: TrainingStep, device: torch.device) -> Row:
    """Measure how long a checkpoint stalls training: until everything is copied to the CPU."""
    engine = step.losses
    assert isinstance(engine, Engine)
    latest: deque[Snapshot | None] = deque(maxlen=1)  # as in a run, a snapshot lives until the next one is taken
    stalls = [
        seconds_of(lambda: latest.append(take_snapshot(step=0, engine=engine, state={})), device) for _ in range(_SAVES)
    ]
    assert latest[0] is not None
    size = sum(tensor.nbytes for tensors in latest[0].files.values() for tensor in tensors.values())
    return {"GB": size / 1e9, "stalls for seconds": spread(stalls), "a step's seconds": seconds_of(step, device)}


def _side_by_side(columns: dict[str, dict[str, float]]) -> list[Row]:
    """Return one row per part, with one column per step."""
    parts = dict.fromkeys(part for column in columns.values() for part in column)
    return [{"part": part} | {name: column.get(part, 0.0) for name, column in columns.items()} for part in parts]
