"""`benchmark step`: speed, FLOPs, memory and time shares of an optimizer step, compared with the plain version.

    config -> Contest -> FLOPs counted, memory, steps interleaved, shares of time -> Report

Images are synthetic, and weights that would be downloaded are random: speed depends on neither.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import nn

from maedistill.benchmark.matrix_peak import matrix_peak
from maedistill.benchmark.memory import peak_memory
from maedistill.benchmark.report import Report, Row
from maedistill.benchmark.timing import Rates, interleave, ratio, spread
from maedistill.benchmark.training_step import StepComparison, TrainingStep
from maedistill.config.pretrain import PretrainConfig
from maedistill.machine import DTYPES
from maedistill.pretraining.build import mask_sizes
from maedistill.pretraining.flops import count_flops
from maedistill.processes import distributed
from maedistill.runs.checkpoint import take_snapshot
from maedistill.runs.start import join
from maedistill.training.compilation import should_compile
from maedistill.training.engine import shutdown_distributed

_STEP_SECONDS = 0.7  # the batch is doubled until a step takes longer
_SAVES = 5
_ROUND_SECONDS = 0.5  # a round repeats a step for this long
PLAIN, OURS, COMPILED, ENGINE = "plain", "ours", "ours, compiled", "ours, DeepSpeed engine"
PUBLISHED = "plain, published decoder"
Steps = dict[str, TrainingStep]


def measure_step(config: PretrainConfig, *, batch: int | None, rounds: int) -> Report:
    """Measure steps of `batch` images; None: as many as take about a second, at most engine.micro_batch.

    Opens a process group of one for the engine, and closes it. Raises ConfigError for a number format that the machine
    does not support, and for a teacher that cannot be built.
    """
    join(config)
    try:
        contest = StepComparison(without_download(config), distributed.device())
        steps = {PLAIN: contest.plain(), OURS: contest.ours()}
        chosen = batch or _batch(contest, steps[OURS], most=config.engine.micro_batch_limit)
        contest.take(chosen)
        return _compare(contest, steps, batch=chosen, rounds=rounds)
    finally:
        shutdown_distributed()


def without_download(config: PretrainConfig) -> PretrainConfig:
    """Return the config with random teacher weights of the same shape, if the real ones are a download or a file."""
    teacher = config.teacher
    kind, _, name = (teacher.source or "").partition(":")
    name = {"timm": name, "file": teacher.model}.get(kind)
    if name is None:
        return config
    changed = {"source": f"random:{name}", "model": None, "sha256": None}
    return config.model_copy(update={"teacher": teacher.model_copy(update=changed)})


def _compare(contest: StepComparison, steps: Steps, *, batch: int, rounds: int) -> Report:
    """Build all tables. Memory is measured before the other steps are built, which would occupy some of it."""
    device, settings = contest.device, contest.config.engine
    is_compiled = should_compile(settings.compile, device, zero=settings.zero)
    methods = {PLAIN: contest.plain_method, OURS: contest.method}
    losses = {name: _loss(step, steps[OURS]) for name, step in steps.items()}
    memory = {name: _memory(step, device) / batch for name, step in steps.items()}
    if (published := contest.published_method()) is not None:
        methods[PUBLISHED], steps[PUBLISHED] = published, contest.plain(published)
    if is_compiled:
        steps[COMPILED] = contest.ours(compiled=True)
    steps[ENGINE] = contest.engine(compiled=is_compiled)
    best = COMPILED if is_compiled else OURS
    peak, side = matrix_peak(DTYPES[contest.precision], device)
    repeats = math.ceil(_ROUND_SECONDS / _seconds(steps[OURS], device))
    paths = {name: _path(step, device, batch=batch, repeats=repeats) for name, step in steps.items()}
    rates = interleave(paths, rounds=rounds)
    shares = {name: _shares(steps[name], device, repeats=rounds * repeats) for name in (PLAIN, best)}
    flops = {name: _flops(contest, method) for name, method in methods.items()}
    tables = {
        f"steps of {batch} images, {contest.precision}": _speed(rates, flops, peak),
        "images/s against each other": _ratios(rates, best),
        "GFLOP per image, counted": _side_by_side("part", flops),
        "share of time": _side_by_side("part", shares),
        f"MB per image, {_MEMORY[device.type]}": [{name: size / 1e6 for name, size in memory.items()}],
        "a checkpoint, written while training goes on": [_checkpoint(steps[ENGINE], device)],
    }
    return Report(tables, _remarks(contest, batch=batch, peak=peak, side=side, losses=losses, steps=steps))


_MEMORY = {
    "cuda": "most that forward and backward pass allocate at once",
    "cpu": "most bytes of tensors of forward and backward pass that are alive at once, counted",
}


def _flops(contest: StepComparison, method: nn.Module) -> dict[str, float]:
    """Return the GFLOP per image by part: of our method with our teacher, or of a plain method with a plain one."""
    teacher = contest.teacher if method is contest.method else contest.plain_teacher
    student_sees, teacher_sees = mask_sizes(contest.config, contest.num_patches)
    return count_flops(method, teacher, num_student=student_sees, num_teacher=teacher_sees)


@torch.no_grad()
def _loss(step: TrainingStep, ours: TrainingStep) -> float:
    """Return the loss of `step` on the images and masks that `ours` draws."""
    images, split = ours.draw()
    target = step.teacher(images, split) if step.teacher is not None else None
    return step.losses(images, split, target)["loss"].item()


def _memory(step: TrainingStep, device: torch.device) -> int:
    """Return the peak bytes of forward and backward pass, beside weights, gradients and the optimizer's moments."""
    step.gradients()  # allocates the gradients
    found = peak_memory(step.gradients, device)
    step()  # frees them again
    return found


def _batch(contest: StepComparison, step: TrainingStep, *, most: int) -> int:
    """Return the smallest power of two whose step takes `_STEP_SECONDS`, at most `most`."""
    batch = 1
    while True:
        contest.take(batch)
        step()  # the first step of a shape is slower
        if batch == most or _seconds(step, contest.device) > _STEP_SECONDS:
            return batch
        batch = min(2 * batch, most)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _seconds(step: TrainingStep, device: torch.device) -> float:
    """Return the seconds of one step."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _path(step: TrainingStep, device: torch.device, *, batch: int, repeats: int) -> Callable[[], int]:
    """Return the function that `interleave` times: `repeats` steps, until the device has finished them."""

    def run() -> int:
        for _ in range(repeats):
            step()
        _wait(device)
        return batch * repeats

    return run


def _shares(step: TrainingStep, device: torch.device, *, repeats: int) -> dict[str, float]:
    """Return each part's share of the time of a step that waits for the device after each part."""
    spent: dict[str, float] = {}
    for _ in range(repeats):
        _wait(device)
        last = time.perf_counter()

        def mark(part: str) -> None:
            nonlocal last
            _wait(device)
            now = time.perf_counter()
            spent[part] = spent.get(part, 0.0) + now - last
            last = now

        step(mark)
    total = sum(spent.values())
    return {part: seconds / total for part, seconds in spent.items()}


def _speed(rates: dict[str, Rates], flops: dict[str, dict[str, float]], peak: float) -> list[Row]:
    """Return one row per step: images/s, and its own FLOPs as a share of the matrix peak."""
    rows = []
    for name, rate in rates.items():
        per_image = flops.get(name, flops[OURS])["total"] * 1e9
        share = spread(tuple(images * per_image / peak for images in rate.rounds))
        rows.append({"step": name, "images/s": rate.spread, "MFU": share})
    return rows


def _ratios(rates: dict[str, Rates], best: str) -> list[Row]:
    """Return the speed ratios between pairs of steps, taken within rounds."""
    pairs = [(name, other) for name in (OURS, COMPILED) for other in (PLAIN, PUBLISHED)] + [(ENGINE, best)]
    known = [(name, other) for name, other in pairs if name in rates and other in rates]
    return [{"step": name, "against": other, "times": ratio(rates[name], rates[other])} for name, other in known]


def _checkpoint(step: TrainingStep, device: torch.device) -> Row:
    """Measure how long a checkpoint stalls training: until everything is copied to the CPU."""
    stalls = []
    for _ in range(_SAVES):
        _wait(device)
        start = time.perf_counter()
        snapshot = take_snapshot(step=0, engine=step.losses, state={})
        stalls.append(time.perf_counter() - start)
    size = sum(tensor.nbytes for tensors in snapshot.files.values() for tensor in tensors.values())
    return {"GB": size / 1e9, "stalls for seconds": spread(tuple(stalls)), "a step's seconds": _seconds(step, device)}


def _side_by_side(key: str, columns: dict[str, dict[str, float]]) -> list[Row]:
    """Return one row per part, with one column per step."""
    parts = dict.fromkeys(part for column in columns.values() for part in column)
    return [{key: part} | {name: column.get(part, 0.0) for name, column in columns.items()} for part in parts]


def _remarks(
    contest: StepComparison, *, batch: int, peak: float, side: int, losses: dict[str, float], steps: Steps
) -> list[str]:
    """Explain how to read the tables."""
    config = contest.config
    lines = [
        f"plain: the same weights and losses as published loops compute them ({contest.plain_precision}): all patches "
        "embedded then dropped, whole teacher, argsort and unshuffle, every patch predicted (by cross-attention: every "
        "hidden one asked for), softmax(QK')V written out, loss.item() at every step, torch's default AdamW loop",
        f"loss of the same images and masks: {losses[PLAIN]:.6f} plain, {losses[OURS]:.6f} ours",
        f"MFU: counted FLOPs against {peak / 1e9:,.1f} GFLOP/s, the fastest square matrix product here (side {side}, "
        f"{contest.precision})",
        f"a step takes {batch} images: --batch, or so many that it lasts about a second, at most engine.micro_batch="
        f"{config.engine.micro_batch_limit}",
        "images are made up: nothing waits for data here, `benchmark.py loader` measures that",
    ]
    if contest.plain_teacher is not None:
        lines.append(f"teacher: {config.teacher.source}; the plain one also runs {contest.plain_teacher.title}")
    if PUBLISHED in steps:
        lines.append(f"{PUBLISHED}: the student's is 512 wide, 8 blocks, 16 heads: more work than {PLAIN} and ours do")
    return lines
