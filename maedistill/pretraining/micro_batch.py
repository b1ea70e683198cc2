"""The micro-batch of pre-training on GPUs: as large as their memory allows, and the same when the run continues."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from maedistill.config.plan import Plan, batch_plans
from maedistill.config.pretrain import PretrainConfig
from maedistill.machine import runs_on_gpu
from maedistill.processes import distributed
from maedistill.runs.checkpoint import checkpoint_steps
from maedistill.runs.folder import RunFolder
from maedistill.runs.previous import known_metadata
from maedistill.training.memory_fit import fit_to_memory


def is_fitted(config: PretrainConfig, device: torch.device) -> bool:
    """Return whether the micro-batch is fitted: on a GPU, if `engine.micro_batch` is not set.

    With `engine.deterministic` nothing is fitted, because two runs could choose different sizes.
    """
    return config.engine.micro_batch is None and not config.engine.deterministic and device.type == "cuda"


def fit_micro_batch(
    config: PretrainConfig,
    plan: Plan,
    module: nn.Module,
    trial: Callable[[int], None],
    *,
    device: torch.device,
    fresh: bool,
) -> tuple[Plan, int]:
    """Return the plan with the largest micro-batch that fits, and the bytes of memory it was fitted to. Collective.

    trial: a forward and backward pass of so many samples. A run that continues with as many ranks, the same memory and
    as many jobs on a GPU keeps its micro-batch, so that its sums are bit-identical. Before its first checkpoint, and
    with `fresh` (the run in the folder is about to be deleted), it is fitted anew.
    """
    plans = batch_plans(config.optim.global_batch, world_size=plan.world_size, group=config.group)
    memory = min(distributed.gather_objects(torch.cuda.get_device_properties(device).total_memory))
    known = {} if fresh else distributed.on_main(lambda: _fitted_before(RunFolder(config.run)))
    memory //= runs_on_gpu()
    fits = {"ranks": plan.world_size, "fitted_to_bytes": memory}
    batch = next((one for one in plans if known == fits | {"micro_batch": one.micro_batch}), None)
    if batch is None:
        numbers = sum(p.numel() for p in module.parameters())
        # bytes per parameter; moments are partitioned from ZeRO 1 on
        moments, reduction = 8 / (plan.world_size if config.engine.zero else 1), 4
        later = numbers * (moments + reduction + 4 * (config.optim.ema is not None))
        batch = fit_to_memory(plans, trial, device=device, later_bytes=later)
        module.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return replace(plan, batch=batch), memory


def _fitted_before(folder: RunFolder) -> dict[str, Any]:
    """Return the micro-batch of the run in a folder, and what it was fitted to; empty before its first checkpoint."""
    if not checkpoint_steps(folder.checkpoints):
        return {}
    return known_metadata(folder.path).get("batch", {})
