"""The plan of a run: how ranks and micro-batches share a global batch, and how many steps there are.

`global_batch` is given; the rest follows from it. This is checked before torch is imported, so that a batch that cannot
be shared fails before any GPU is started.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from maedistill.config.auto import size_warnings
from maedistill.config.schema import RunConfig
from maedistill.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """A step of one rank: `accumulation` micro-batches of `micro_batch` samples each."""

    micro_batch: int
    accumulation: int


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run, derived from its config and its numbers of images and ranks."""

    batch: BatchPlan
    world_size: int
    images: int
    steps: int
    warmup_steps: int

    @property
    def global_batch(self) -> int:
        """Return the samples of a step."""
        return self.batch.micro_batch * self.batch.accumulation * self.world_size

    def steps_in(self, epochs: float) -> float:
        """Return the number of steps in `epochs` epochs; one epoch is `images` samples."""
        return epochs * self.images / self.global_batch

    def epoch_at(self, step: int) -> float:
        """Return the epochs done after `step` steps."""
        return step / self.steps_in(1.0)

    def epoch_of(self, step: int) -> int:
        """Return the number of the epoch in which a step begins, from 0."""
        return step * self.global_batch // self.images


def make_plan(config: RunConfig, images: int, *, world_size: int) -> Plan:
    """Derive the plan. Raises ConfigError if the ranks cannot share the batch, or if the run has no steps."""
    optim = config.optim
    batch = share_batch(config, world_size)
    steps = total_steps(optim.epochs, images, global_batch=optim.global_batch)
    warmup = min(steps - 1, int(Fraction(repr(optim.warmup_epochs)) * images // optim.global_batch))
    return Plan(batch, world_size, images, steps, warmup)


def plan_lines(config: RunConfig, plan: Plan) -> list[str]:
    """Describe batch, steps and learning rate, with every factor."""
    optim, batch = config.optim, plan.batch
    factors = "" if optim.lr else f" = {optim.peak_lr * 256 / optim.global_batch:g} x {optim.global_batch} / 256"
    return [
        f"batch    {optim.global_batch} = {plan.world_size} ranks x {batch.accumulation} x {batch.micro_batch} samples",
        f"steps    {plan.steps:,} = floor({optim.epochs:g} epochs x {plan.images:,} / {optim.global_batch}), "
        f"{plan.warmup_steps:,} of them warm-up",
        f"lr       {optim.peak_lr:.3g}{factors}, linear warm-up, then cosine to {optim.min_lr:g}",
        f"run      {config.run}",
        *size_warnings(config, plan.images, plan.steps, world_size=plan.world_size),
    ]


def share_batch(config: RunConfig, world_size: int) -> BatchPlan:
    """Return how `world_size` ranks share the global batch. Raises ConfigError if they cannot."""
    limit = config.engine.micro_batch_limit
    return batch_plan(config.optim.global_batch, limit, world_size=world_size, group=config.group)


def batch_plan(global_batch: int, micro_batch: int, *, world_size: int, group: int = 1) -> BatchPlan:
    """Share a global batch evenly among ranks, in the fewest equal micro-batches of at most `micro_batch` samples.

    group: a micro-batch is a multiple of it.
    Raises `ConfigError` if the ranks cannot share the batch evenly, or if a group exceeds a micro-batch.
    """
    if micro_batch < group:
        raise ConfigError(
            f"engine.micro_batch: {micro_batch} is less than the {group} samples that stay together",
            f"use engine.micro_batch={group} or more",
        )
    plans = batch_plans(global_batch, world_size=world_size, group=group)
    return next(plan for plan in plans if plan.micro_batch <= micro_batch)


def batch_plans(global_batch: int, *, world_size: int, group: int = 1) -> list[BatchPlan]:
    """Return every even share of a global batch, the largest micro-batch first, each a multiple of `group`.

    Raises `ConfigError` if there is none.
    """
    groups, rest = divmod(global_batch, group * world_size)
    if rest:
        raise _uneven(global_batch, world_size=world_size, group=group)
    counts = [count for count in range(1, groups + 1) if groups % count == 0]
    return [BatchPlan(micro_batch=groups // count * group, accumulation=count) for count in counts]


def total_steps(epochs: float, images: int, *, global_batch: int) -> int:
    """Return floor(epochs * images / global_batch), with `epochs` as the decimal that was written, so 0.1 is a tenth.

    Raises `ConfigError` if that is 0.
    """
    samples = Fraction(repr(epochs)) * images
    steps = int(samples // global_batch)
    if steps == 0:
        raise ConfigError(
            f"optim.epochs: {epochs:g} epochs of {images} images are {float(samples):g} samples, "
            f"less than one step of optim.global_batch={global_batch}",
            "use a smaller optim.global_batch, more epochs, or more images",
        )
    return steps


def world_size_from_environment(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks from the launcher: WORLD_SIZE of torchrun and deepspeed, or SLURM_NTASKS of srun.

    SLURM_NTASKS counts only inside a job step: a batch script also sees it, but is one process. Raises `ConfigError`
    for a value that is not a number of ranks.
    """
    name = "WORLD_SIZE" if "WORLD_SIZE" in environment else "SLURM_NTASKS"
    if name not in environment or (name == "SLURM_NTASKS" and "SLURM_STEP_ID" not in environment):
        return 1
    text = environment[name]
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"the environment says {name}={text!r}, not a number of ranks", f"unset {name}, or correct it"
        )
    return int(text)


def is_first_rank() -> bool:
    """Return whether the launcher's environment says that this process is rank 0, or says nothing."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _uneven(global_batch: int, *, world_size: int, group: int) -> ConfigError:
    """Return an error that suggests rank counts near `world_size`, and batches near this one."""
    unit = world_size * group
    batches = [b for b in (global_batch // unit * unit, -(-global_batch // unit) * unit) if b > 0]
    groups, odd = divmod(global_batch, group)
    counts = [] if odd else [n for n in range(1, groups + 1) if groups % n == 0]
    near = [n for n in counts if n < world_size][-1:] + [n for n in counts if n > world_size][:1]
    ranks = f"start {' or '.join(map(str, near))} ranks, or " if near else ""
    what = f"{global_batch} samples" + (f" in groups of {group}" if group > 1 else "")
    return ConfigError(
        f"optim.global_batch: {what} cannot be shared evenly by {world_size} ranks",
        f"{ranks}set optim.global_batch={' or '.join(map(str, batches))}",
    )
