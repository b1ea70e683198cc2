"""How a global batch is shared by ranks and micro-batches, and how many steps a run has. Numbers in, numbers out.

`global_batch` is the truth; the rest follows from it. Known before torch is imported, so a batch that cannot be shared
costs nobody a start of the GPUs.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from maedistill.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """A step of one rank: `accumulation` micro-batches of `micro_batch` samples each."""

    micro_batch: int
    accumulation: int


def batch_plan(global_batch: int, micro_batch: int, *, world_size: int, views: int = 1) -> BatchPlan:
    """Shares a global batch evenly among ranks, in the fewest equal micro-batches of at most `micro_batch` samples.

    views: a micro-batch is a multiple of it, so that the views of an image stay together.
    Raises `ConfigError` where the ranks cannot share the batch evenly, or a micro-batch cannot hold one image's views.
    """
    if micro_batch < views:
        raise ConfigError(
            f"engine.micro_batch: {micro_batch} is less than data.views_per_image={views}, which stay together",
            f"use engine.micro_batch={views} or more",
        )
    images, rest = divmod(global_batch, views * world_size)
    if rest:
        raise _uneven(global_batch, world_size=world_size, views=views)
    most = micro_batch // views
    accumulation = next(a for a in range(-(-images // most), images + 1) if images % a == 0)
    return BatchPlan(micro_batch=images // accumulation * views, accumulation=accumulation)


def total_steps(epochs: float, images: int, *, global_batch: int) -> int:
    """floor(epochs * images / global_batch), with `epochs` as the decimal that was written, so 0.1 is a tenth.

    Raises `ConfigError` where not even one step comes out.
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
    """The number of ranks that the launcher announces: torchrun and deepspeed by WORLD_SIZE, srun by SLURM_NTASKS.

    SLURM_NTASKS counts only inside a job step: a batch script also sees it, but is one process.
    """
    name = "WORLD_SIZE" if "WORLD_SIZE" in environment else "SLURM_NTASKS"
    if name not in environment or (name == "SLURM_NTASKS" and "SLURM_STEP_ID" not in environment):
        return 1
    text = environment[name]
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"the environment says {name}={text!r}, not a number of ranks", f"unset {name}, or set it right"
        )
    return int(text)


def _uneven(global_batch: int, *, world_size: int, views: int) -> ConfigError:
    """Names the rank counts next to `world_size` that divide the batch, and the batches nearby that it does divide."""
    unit = world_size * views
    batches = [b for b in (global_batch // unit * unit, -(-global_batch // unit) * unit) if b > 0]
    images, odd = divmod(global_batch, views)
    counts = [] if odd else [n for n in range(1, images + 1) if images % n == 0]
    near = [n for n in counts if n < world_size][-1:] + [n for n in counts if n > world_size][:1]
    ranks = f"start {' or '.join(map(str, near))} ranks, or " if near else ""
    what = f"{global_batch} samples" + (f" in images of {views} views" if views > 1 else "")
    return ConfigError(
        f"optim.global_batch: {what} cannot be shared evenly by {world_size} ranks",
        f"{ranks}set optim.global_batch={' or '.join(map(str, batches))}",
    )
