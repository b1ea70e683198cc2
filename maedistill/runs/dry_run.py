"""The dry run of any stage: open everything, try a step, print the plan and what it costs, and start nothing."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from maedistill.data.loading.batch import Batch
from maedistill.data.loading.decoded_cache import room_for
from maedistill.data.loading.loader import RandomCrops
from maedistill.escaping import say
from maedistill.machine import autocast, cpu_share, loader_workers, resolve_precision
from maedistill.runs.folder import RunFolder
from maedistill.runs.history import duration, size_text
from maedistill.runs.metrics import memory_gb
from maedistill.runs.start import Stage

_TRIAL_SECONDS = 1.0  # larger batches are tried until a step takes this long


def dry_run(
    stage: Stage,
    crops: RandomCrops,
    inputs_of: Callable[[Batch], tuple[Any, ...]],
    *,
    extend: bool,
    more_lines: Iterable[str] = (),
) -> None:
    """Print the summary of a run and its measured cost. Writes nothing except an index for shards without one.

    inputs_of: the module's inputs from a micro-batch on the device. extend: allow a larger number of epochs.
    Raises what a start would raise for the run folder and for `data.keep_decoded`.
    """
    RunFolder(stage.config.run).check(stage.config, stage.metadata, fresh=False, extend=extend)
    room = room_for(crops, stage.config.data.keep_decoded)
    kept = [] if room is None else [room.line()]
    lines = [*stage.summary_lines, *more_lines, *kept, *_measured_lines(stage, crops, inputs_of)]
    say(*lines, "nothing was started: dry run")


def forward_backward(stage: Stage, inputs: tuple[Any, ...]) -> None:
    """Run the module in the run's number format and the backward pass of its loss, and wait for the device.

    Buffers, such as the running statistics of BatchNorm, stay as they were: it is a trial.
    """
    parts = ((part, name) for part in stage.module.modules() for name in part._buffers)
    before = [
        (part, name, buffer, buffer.clone()) for part, name in parts if (buffer := part._buffers[name]) is not None
    ]
    try:
        with autocast(stage.device, resolve_precision(stage.config.engine.precision, stage.device)):
            losses = stage.module(*inputs)
        stage.require_losses(losses)
        losses["loss"].backward()
        losses["loss"].item()  # waits for the device
    finally:
        for part, name, buffer, value in before:
            part._buffers[name] = buffer.copy_(value)  # the module may have put another tensor in its place


def _measured_lines(stage: Stage, crops: RandomCrops, inputs_of: Callable[[Batch], tuple[Any, ...]]) -> list[str]:
    """Estimate speed, memory and time by trial steps on real images, with batches that grow until a step is long."""
    config, plan = stage.config, stage.plan
    if config.threads is not None:  # as the run itself will
        torch.set_num_threads(config.threads)
    count, seconds = 0, 0.0
    while count < plan.batch.micro_batch and seconds < _TRIAL_SECONDS:
        count = min(plan.batch.micro_batch, 8 * count or 4)
        start = time.perf_counter()
        batch = crops.__getitems__(list(range(count)))
        assert isinstance(batch, Batch)  # outside of a worker
        batch = batch.to(stage.device)
        loading = time.perf_counter() - start
        for _ in range(2):  # the first pass warms up
            start = time.perf_counter()
            forward_backward(stage, inputs_of(batch))
            seconds = time.perf_counter() - start
    stage.module.zero_grad()
    loader, step = count / loading, count / seconds
    parameters = sum(p.numel() for p in stage.module.parameters())
    states = 3 * 4 * parameters / 1e9  # gradients, Adam's two moments, fp32
    networks = (stage.module, *stage.extra_networks.values())
    numbers = sum(value.numel() for network in networks for value in network.state_dict().values())
    numbers += parameters * (2 + (config.optim.ema is not None))
    images_left = plan.steps * config.optim.global_batch / plan.world_size
    workers = loader_workers(config.data.workers, cpu_share(min(plan.world_size, torch.cuda.device_count() or 1)))
    memory = memory_gb(stage.device)
    return [
        f"speed    step {step:.{1 if step >= 1 else 3}f} images/s per rank (forward and backward, {count} images), "
        f"loader {loader:.0f} images/s per worker, {workers} workers",
        f"memory   {memory:.2f} GB with {count} images; gradients and optimizer up to {states:.2f} GB more",
        f"disk     {config.log.keep} checkpoints (log.keep) of {size_text(4 * numbers)}, every "
        f"{config.log.save_every_epochs:g} epochs",
        f"time     about {duration(images_left / min(step, max(1, workers) * loader))} at that speed",
    ]
