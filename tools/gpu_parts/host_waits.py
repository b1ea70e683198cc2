"""The training step in torch's synchronization debug mode, in which every wait for the GPU raises an error.

The checked step includes everything that the loop does at every step: images and masks, teacher, losses, update,
averages, and the check for non-finite numbers. Logging waits on purpose, and so does the loss scale of fp16.
"""

import traceback

import torch

from gpu_parts.check import Check
from gpu_parts.networks import tiny_config
from maedistill.benchmark.training_step import SyntheticTraining
from maedistill.runs.metrics import Averages
from maedistill.runs.nonfinite import LateFlags
from maedistill.training.engine import initialize_distributed

BATCH, WARM = 8, 3


def run(check: Check) -> None:
    """Check the eager step of each method, and one compiled step."""
    if not check.on_card:
        check.skipped("steps", "no card to wait for")
        return
    initialize_distributed(60)
    for method in ("mae", "dmae", "amd", "tinymim"):
        with check.guarded(f"{method}, eager"):
            _watch(check, f"{method}, eager", method, [])
    if check.tiny:
        check.skipped("dmae, compiled", "--tiny compiles nothing")
        return
    with check.guarded("dmae, compiled"):
        _watch(check, "dmae, compiled", "dmae", ["engine.compile=true"])


def _watch(check: Check, name: str, method: str, settings: list[str]) -> None:
    """Run some warm-up steps, then two in the debug mode, and record whether any of them waited."""
    batch = [f"optim.global_batch={BATCH}", f"engine.micro_batch={BATCH}", "optim.clip=1.0"]
    step, number = SyntheticTraining(tiny_config(method, [*batch, *settings]), check.device).engine_step(), 0
    averages, flags = Averages(), LateFlags()

    def one() -> None:
        nonlocal number
        images, split = step.draw()
        losses = step.losses(images, split, step.teacher(images, split) if step.teacher is not None else None)
        step.backward(losses["loss"])
        step.update()
        averages.add(losses)
        flags.push(number, step.losses.update_skipped)  # step.losses is the engine
        number += 1

    for _ in range(WARM):
        one()
    check.wait()
    try:
        torch.cuda.set_sync_debug_mode("error")
        one()
        one()
        failed = None
    except RuntimeError as error:
        failed = str(error).splitlines()[0][:200]
        traceback.print_exc()  # so that the log shows where
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check.verdict(name, failed is None, failed or "two steps, no wait")
