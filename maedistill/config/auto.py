"""Numbers that `auto` leaves to the size of the training set: batch, epochs and warm-up, as pure functions.

    450 images, pre-training -> batch 64, 1,600 epochs, warm-up 80        runs/resolve_auto.py calls `with_numbers`

The papers' numbers are those of 1.28 million images. A batch of 4,096 would see 450 photographs nine times in one
update, and 100 epochs would be ten updates. Small sets need small batches and many epochs: what counts is the number
of updates, and that no update averages over most of the set.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

from maedistill.config.keys import flat, nested
from maedistill.config.schema import AUTO, RunConfig

Config = TypeVar("Config", bound=RunConfig)

FORMAT = "engine.precision"  # whose `auto` depends on the device
KEYS = ("optim.global_batch", "optim.epochs", "optim.warmup_epochs")
_STEPS_PER_EPOCH = 50  # a batch is at most so small a part of the set, above the least batch
_WARMUP = 0.05  # of the epochs; MAE: 40 of 800
_FEW_UPDATES = 1_000
_LARGE_SHARE = 0.1  # of the images in one batch


@dataclass(frozen=True)
class Limits:
    """What a stage aims at, and the smallest and largest values that its papers or small sets call for."""

    updates: int
    batch: tuple[int, int]
    epochs: tuple[int, int]


LIMITS = {
    "pretrain": Limits(updates=20_000, batch=(64, 4096), epochs=(100, 1600)),  # DMAE 100, MAE 1,600 epochs
    "finetune": Limits(updates=5_000, batch=(32, 1024), epochs=(50, 300)),  # MAE's ViT-L 50, MAE-Lite 300 epochs
}


def auto_batch(images: int, limits: Limits, *, unit: int = 1) -> int:
    """Return the largest power of two that is at most a 50th of the images, within the limits.

    unit: samples that the ranks can share evenly; the batch is rounded to a multiple of it.
    """
    least, most = limits.batch
    power = 1 << max(0, (images // _STEPS_PER_EPOCH).bit_length() - 1)
    return max(1, round(min(most, max(least, power)) / unit)) * unit


def auto_epochs(images: int, batch: int, limits: Limits) -> int:
    """Return the epochs that make the stage's number of updates, rounded up to tens, within the limits."""
    least, most = limits.epochs
    return min(most, max(least, -(-limits.updates * batch // (10 * images)) * 10))


def auto_keys(config: RunConfig) -> list[str]:
    """Return the keys that are `auto`."""
    values = flat(config)
    return [key for key in KEYS if values[key] == AUTO]


def with_numbers(config: Config, images: int, *, world_size: int) -> Config:
    """Return the config with a number for each `auto`. images: that are trained on."""
    limits, values = LIMITS[config.stage], flat(config)
    if values["optim.global_batch"] == AUTO:
        values["optim.global_batch"] = auto_batch(images, limits, unit=config.group * world_size)
    if values["optim.epochs"] == AUTO:
        values["optim.epochs"] = float(auto_epochs(images, values["optim.global_batch"], limits))
    if values["optim.warmup_epochs"] == AUTO:
        values["optim.warmup_epochs"] = float(f"{values['optim.epochs'] * _WARMUP:.6g}")
    return with_values(config, {key: values[key] for key in KEYS})


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """Return the config with other values of these keys, checked as any others."""
    return type(config).model_validate(nested(flat(config) | values), strict=False)


def with_numbers_of(config: Config, before: RunConfig) -> Config:
    """Return the config with the values of another, for all that it leaves to data, weights or device."""
    values, numbers = flat(config), flat(before)
    open_keys = [key for key in (*KEYS, FORMAT, "data.image_size") if values[key] in (AUTO, None)]
    return with_values(config, {key: numbers[key] for key in open_keys})


def auto_line(before: RunConfig, config: RunConfig, images: int, *, of_the_run: bool) -> str:
    """Describe what `auto` became and why, in one line. of_the_run: the run in the folder has begun with it."""
    limits, optim = LIMITS[config.stage], config.optim
    texts = {
        "optim.global_batch": f"batch {optim.global_batch} (a 50th of the images, within {limits.batch[0]} to "
        f"{limits.batch[1]:,})",
        "optim.epochs": f"{optim.epochs:g} epochs (for {limits.updates:,} updates, within {limits.epochs[0]} to "
        f"{limits.epochs[1]:,})",
        "optim.warmup_epochs": f"warm-up {optim.warmup_epochs:g} (5 %)",
    }
    chosen = ", ".join(texts[key] for key in auto_keys(before))
    return f"auto     {chosen}: " + ("as this run began" if of_the_run else f"for {images:,} images")


def size_warnings(config: RunConfig, images: int, steps: int, *, world_size: int) -> list[str]:
    """Return one line with better values if the batch is large for so few images, or if there are few updates."""
    limits, batch, epochs = LIMITS[config.stage], config.optim.global_batch, config.optim.epochs
    causes: list[str] = []
    better: dict[str, int] = {}
    suited = auto_batch(images, limits, unit=config.group * world_size)
    if batch > max(suited, _LARGE_SHARE * images):
        causes.append(f"a batch of {batch} is more than a tenth of {images:,} images")
        better["optim.global_batch"] = suited
    if steps < _FEW_UPDATES:
        causes.append(f"{steps:,} update{'s are' if steps != 1 else ' is'} few")
        if (more := auto_epochs(images, better.get("optim.global_batch", batch), limits)) > epochs:
            better["optim.epochs"] = more
    if not better:
        return []
    named = " ".join(f"{key}={value}" for key, value in better.items())
    return [f"warning  {' and '.join(causes)}: {named} suits this number of images (or use auto)"]
