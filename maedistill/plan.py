"""What a run is going to do and cost, said before it starts: the lines of `--dry-run` and of every run's head."""

import time
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from maedistill.build import (
    DTYPES,
    build_crops,
    build_encoder,
    build_index,
    build_method,
    build_teacher,
    build_teacher_source,
    cpu_share,
    mask_sizes,
    precision,
    split_of,
)
from maedistill.config.batch import BatchPlan, batch_plan, total_steps, world_size_from_environment
from maedistill.config.schema import PretrainConfig
from maedistill.data.index import ShardIndex, open_index
from maedistill.data.loader import Batch
from maedistill.data.transforms import to_unit
from maedistill.flops import count_flops
from maedistill.methods.mae import MAE
from maedistill.models.teacher import Teacher, TeacherSource
from maedistill.training.metrics import duration, memory_gb
from maedistill.training.run_folder import RunFolder

_TRIAL_SECONDS = 1.0  # a dry run tries larger batches until a step takes so long


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run, derived from config, index and number of ranks."""

    batch: BatchPlan
    world_size: int
    images: int
    steps: int
    warmup_steps: int

    def steps_in(self, epochs: float) -> float:
        """Steps of so many epochs; one epoch is `images` samples."""
        return epochs * self.images / (self.batch.micro_batch * self.batch.accumulation * self.world_size)

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step / self.steps_in(1.0)


def make_plan(config: PretrainConfig, index: ShardIndex, *, world_size: int) -> Plan:
    """Raises ConfigError where the batch cannot be shared by the ranks or not even one step comes out."""
    optim = config.optim
    batch = batch_plan(
        optim.global_batch, config.engine.micro_batch, world_size=world_size, views=config.data.views_per_image
    )
    steps = total_steps(optim.epochs, len(index), global_batch=optim.global_batch)
    warmup = min(steps - 1, int(Fraction(repr(optim.warmup_epochs)) * len(index) // optim.global_batch))
    return Plan(batch, world_size, len(index), steps, warmup)


def open_data(config: PretrainConfig) -> tuple[ShardIndex, ShardIndex | None]:
    """The indexes of training and validation shards; labels that kNN will need are missed now, not after hours."""
    index = build_index(config)
    val_index = open_index(config.data.val) if config.data.val else None
    if val_index is not None and config.log.knn_every_epochs is not None:
        index.require_labels()
        val_index.require_labels()
    return index, val_index


def run_facts(index: ShardIndex, source: TeacherSource | None) -> dict[str, Any]:
    """What run.json keeps of a start: which samples, which teacher, and the licence of the weights that went in."""
    return {
        "data": {"images": len(index), "fingerprint": index.fingerprint()},
        "teacher": source.describe() if source is not None else None,
        "licence": source.licence if source is not None else "yours: no other weights were used",
    }


def plan_lines(
    config: PretrainConfig, plan: Plan, index: ShardIndex, method: MAE, source: TeacherSource | None
) -> list[str]:
    """The plan in words, one fact a line."""
    optim, batch = config.optim, plan.batch
    num_patches = method.encoder.grid**2
    student, teacher = mask_sizes(config, num_patches)
    seen = f"student sees {student} of {num_patches} patches"
    if source is not None:
        seen += f", teacher {teacher} (nested)" if teacher > student else ", teacher the same"
    sizes = {name: _millions(child) for name, child in method.named_children()}
    images = f"{plan.images:,} images in {len(index.shards)} shards at {config.data.image_size} px"
    factors = "" if optim.lr else f" = {optim.peak_lr * 256 / optim.global_batch:g} x {optim.global_batch} / 256"
    lines = [
        f"method   {config.method}: {seen}",
        f"student  {config.student.title}  " + ", ".join(f"{name} {size:.2f} M" for name, size in sizes.items()),
        f"data     {images}, {config.data.train}",
        f"batch    {optim.global_batch} = {plan.world_size} ranks x {batch.accumulation} x {batch.micro_batch} samples",
        f"steps    {plan.steps:,} = floor({optim.epochs:g} epochs x {plan.images:,} / {optim.global_batch}), "
        f"{plan.warmup_steps:,} of them warm-up",
        f"lr       {optim.peak_lr:.3g}{factors}, linear warm-up, then cosine to {optim.min_lr:g}",
        f"run      {config.run}",
    ]
    if source is not None:
        lines.insert(1, f"teacher  {source.describe()}")
    return lines


def dry_run(config: PretrainConfig) -> None:
    """Opens data, teacher and run folder, counts FLOPs, times a step and the loader, and prints the plan.

    Writes nothing, but for the index of shards that have none.
    """
    world_size = world_size_from_environment()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    index, _ = open_data(config)
    plan = make_plan(config, index, world_size=world_size)
    encoder = build_encoder(config)
    source = build_teacher_source(config, grid=encoder.grid)
    RunFolder(config.run).check(config, run_facts(index, source), fresh=False, extend=False)
    method = build_method(config, encoder, source).to(device)
    teacher = build_teacher(config, source, device) if source is not None else None
    student_sees, teacher_sees = mask_sizes(config, encoder.grid**2)
    flops = count_flops(method, teacher, num_student=student_sees, num_teacher=teacher_sees)
    lines = plan_lines(config, plan, index, method, source)
    lines.append("flops    " + ", ".join(f"{name} {value:.2f}" for name, value in flops.items()) + " GFLOP per image")
    lines += _measured(config, plan, index, method, teacher, device)
    print("\n".join(lines) + "\nnothing was started: dry run", flush=True)


def _measured(
    config: PretrainConfig, plan: Plan, index: ShardIndex, method: MAE, teacher: Teacher | None, device: torch.device
) -> list[str]:
    """Speed, memory and time from trial steps on real crops, larger and larger until one takes long enough."""
    crops = build_crops(config, index)
    count, seconds = 0, 0.0
    while count < plan.batch.micro_batch and seconds < _TRIAL_SECONDS:
        count = min(plan.batch.micro_batch, 8 * count or 4)
        start = time.perf_counter()
        batch = crops.__getitems__(list(range(count))).to(device)
        loader = count / (time.perf_counter() - start)
        seconds = _trial_step(config, batch, method, teacher, device)
    step = count / seconds
    states = 3 * 4 * sum(p.numel() for p in method.parameters()) / 1e9  # gradients and Adam's two moments, fp32
    images_left = plan.steps * config.optim.global_batch / plan.world_size
    workers = config.data.workers if config.data.workers is not None else min(8, cpu_share(1))
    return [
        f"speed    step {step:.1f} images/s per rank (forward and backward, {count} images), "
        f"loader {loader:.0f} images/s per worker, {workers} workers",
        f"memory   {memory_gb(device):.2f} GB with {count} images; gradients and optimizer up to {states:.2f} GB more",
        f"time     about {duration(images_left / min(step, max(1, workers) * loader))} at that speed",
    ]


def _trial_step(
    config: PretrainConfig, batch: Batch, method: MAE, teacher: Teacher | None, device: torch.device
) -> float:
    """Seconds of one forward and backward pass, after one that warms up."""
    dtype = DTYPES[precision(config.engine.precision, device)]
    for _ in range(2):
        start = time.perf_counter()
        images, split = to_unit(batch.images), split_of(config, batch.positions, method.encoder.grid**2)
        target = teacher(images, split) if teacher is not None else None
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = method(images, split, target)["loss"]
        loss.backward()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - start
    method.zero_grad()
    return seconds


def _millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6
