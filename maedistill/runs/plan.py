"""The plan of a run: batches, steps and learning rate, printed at its start and by `--dry-run`."""

from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from maedistill.config.batch import BatchPlan, total_steps
from maedistill.config.schema import RunConfig


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run, derived from its config and its numbers of images and ranks."""

    batch: BatchPlan
    world_size: int
    images: int
    steps: int
    warmup_steps: int

    def steps_in(self, epochs: float) -> float:
        """Return the number of steps in `epochs` epochs; one epoch is `images` samples."""
        return epochs * self.images / (self.batch.micro_batch * self.batch.accumulation * self.world_size)

    def epoch_at(self, step: int) -> float:
        """Return the epochs done after `step` steps."""
        return step / self.steps_in(1.0)


def make_plan(config: RunConfig, images: int, *, world_size: int) -> Plan:
    """Derive the plan. Raises ConfigError if the ranks cannot share the batch, or if the run has no steps."""
    optim = config.optim
    batch = config.share_batch(world_size)
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
    ]


def num_params_m(module: nn.Module) -> float:
    """Return the number of parameters of a module, in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6
