"""Rules between the keys of any stage: each rule reads a config or a section and yields a `Problem` for each mistake.

Every value is already valid by itself. `pretrain_rules.py` and `finetune_rules.py` list those of their stage. Only
what the config alone shows is checked here. What needs the shards, a weights file or timm is checked when those are
opened, with errors of the same form.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from maedistill.config.architectures import Architecture
from maedistill.config.schema import AUTO, RunConfig
from maedistill.config.sources import PYTHON_KIND, why_unnamed
from maedistill.durable import why_not_local

# Prefixes of timm's plain ViTs; models/encoder.py rejects other classes with these prefixes.
FAMILIES = ("vit_", "deit", "flexivit_", "aimv2_", "beit3_", "eva_", "eva02_", "test_vit")


@dataclass(frozen=True)
class Problem:
    """What is wrong with the value of the dotted `key`, and how to fix it. Only the loader knows where it was set.

    gives_way: pairs (key, other) that exclude each other; where `other` was set above `key`, as the command line is
    above a file and a file above those it extends, `key` is dropped and there is no problem.
    of_command_line: it is one only if `key` is set there; a recipe in a file may be for runs that use the key.
    """

    key: str
    cause: str
    remedy: str
    gives_way: tuple[tuple[str, str], ...] = ()
    of_command_line: bool = False


def paths(c: RunConfig) -> Iterator[Problem]:
    """Yield problems for paths that a run needs and a recipe leaves open."""
    if not c.data.train:
        remedy = "add data.train=DIR/train-*.tar (maedistill shards writes shards)"
        yield Problem("data.train", "no training shards are named", remedy)
    if not c.run:
        yield Problem("run", "no run folder is named", "add run=runs/NAME")
    elif problem := why_not_local(c.run):
        yield Problem("run", *problem)


def trackers(c: RunConfig) -> Iterator[Problem]:
    """Yield a problem for each tracker whose package is missing. TensorBoard, a default, may be missing."""
    for name in c.log.trackers:
        spec = find_spec(name)
        if name != "tensorboard" and (spec is None or spec.origin is None):  # W&B's folder `wandb` is no package
            yield Problem("log.trackers", f"{name} is not installed", f"pip install 'maedistill[{name}]'")
        elif name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI") and find_spec("sqlalchemy") is None:
            cause = "MLFLOW_TRACKING_URI is not set, and only the full mlflow package has its own database"
            yield Problem("log.trackers", cause, "set MLFLOW_TRACKING_URI=http://HOST:PORT, or pip install mlflow")


def deviations(key: str, std: tuple[float, ...] | None) -> Iterator[Problem]:
    """Yield a problem unless the standard deviations are above 0, since pixels are divided by them."""
    if std is not None and min(std) <= 0:
        yield Problem(key, f"{list(std)} is not above 0", "use the deviations of pixels in [0, 1]")


def mean_with_std(section: str, *, mean: object, std: object) -> Iterator[Problem]:
    """Yield a problem unless mean and std are both given or both left to the weights' source."""
    if (mean is None) != (std is None):
        given = "std" if mean is None else "mean"
        yield Problem(f"{section}.{given}", "mean and std go together", "give both or none")


def crops(c: RunConfig) -> Iterator[Problem]:
    """Yield problems for invalid ranges of RandomResizedCrop."""
    for key, (low, high) in (("crop_scale", c.data.crop_scale), ("crop_ratio", c.data.crop_ratio)):
        if not 0 < low <= high:
            cause = f"[{low:g}, {high:g}] is not an increasing pair above 0"
            yield Problem(f"data.{key}", cause, "put the smaller value first")


def schedule(c: RunConfig) -> Iterator[Problem]:
    """Yield problems between learning rates and between lengths."""
    o = c.optim
    if o.lr is not None and o.base_lr is not None:
        means = "" if o.global_batch == AUTO else f", here lr={o.base_lr * o.global_batch / 256:g}"
        yield Problem(
            "optim.lr",
            f"both lr={o.lr:g} and base_lr={o.base_lr:g} are given",
            f"keep one of them; base_lr={o.base_lr:g} means {o.base_lr:g} x global_batch / 256{means}",
            (("optim.lr", "optim.base_lr"), ("optim.base_lr", "optim.lr")),
        )
    elif (o.lr is not None or o.global_batch != AUTO) and o.min_lr > o.peak_lr:
        cause = f"{o.min_lr:g}, where the cosine ends, is above lr={o.peak_lr:g}, where it starts"
        usual = type(o).model_fields["min_lr"].default
        yield Problem("optim.min_lr", cause, f"use a smaller one; {usual:g} in the papers")
    if AUTO not in (o.warmup_epochs, o.epochs) and o.warmup_epochs >= o.epochs:
        yield Problem(
            "optim.warmup_epochs",
            f"{o.warmup_epochs:g} is not below epochs={o.epochs:g}",
            f"shorten the warm-up (5 % of the epochs is MAE's choice: {o.epochs * 0.05:g})",
        )


def engine(c: RunConfig) -> Iterator[Problem]:
    """Yield problems for settings that ZeRO 3 cannot be combined with."""
    if c.engine.zero == 3 and c.optim.ema is not None:
        cause = "a moving average needs whole weights, and ZeRO 3 partitions them"
        yield Problem("optim.ema", cause, "use engine.zero=2, or optim.ema=null")
    if c.engine.zero == 3 and c.engine.compile:
        cause = "a compiled student needs whole weights, and ZeRO 3 partitions them"
        yield Problem("engine.compile", cause, "use engine.zero=2, or engine.compile=false")


def kind_of_source(key: str, source: str, *, kinds: tuple[str, ...]) -> Iterator[Problem]:
    """Yield a problem unless a source of weights has the form KIND:NAME."""
    if not source.startswith(f"{PYTHON_KIND}:") and (problem := why_unnamed(source, kinds)):
        yield Problem(key, *problem)


def checksum(section: str, sha256: str | None, *, kind: str, noun: str) -> Iterator[Problem]:
    """Yield a problem for a checksum of anything but a single file."""
    if kind != "file" and sha256 is not None:
        cause = f"only a file: {noun} is checked against it, not a {kind}: {noun}"
        yield Problem(f"{section}.sha256", cause, "remove it", ((f"{section}.sha256", f"{section}.source"),))


def several_weights(key: str, weights: str | None, *, source: str, source_key: str) -> Iterator[Problem]:
    """Yield a problem for a choice between weights of a source that has only one set of them."""
    kind = source.partition(":")[0]
    if weights not in (None, "model") and kind not in ("file", "run"):
        cause = f"a {kind}: source has one set of weights, no {weights!r}"
        yield Problem(key, cause, "remove it; only files and runs have several", ((key, source_key),))


def family(key: str, model: str | None) -> Iterator[Problem]:
    """Yield a problem unless `model` is a plain Vision Transformer, the only kind that can run on selected patches."""
    if model is not None and not model.startswith((*FAMILIES, f"{PYTHON_KIND}:")):
        remedy = "use a vit_*, deit* or eva02_* name, e.g. vit_small_patch16_224"
        remedy += "; name others as teacher.source=timm:NAME or local-dir:FOLDER" if key == "teacher.model" else ""
        yield Problem(key, f"{model!r} is not a plain ViT of timm", remedy)


def whole_patches(c: RunConfig, arch: Architecture | None) -> Iterator[Problem]:
    """Yield a problem unless the student's patches tile its image."""
    size = c.data.image_size
    if arch is not None and size is not None and size % arch.patch_size:
        near = max(1, round(size / arch.patch_size)) * arch.patch_size
        cause = f"patch size {arch.patch_size} does not divide {size}"
        yield Problem("data.image_size", cause, f"use {near}, or another student.patch_size")


def blocks(key: str, depths: tuple[int, ...], *, arch: Architecture | None, who: str) -> Iterator[Problem]:
    """Yield a problem unless the network has blocks of these depths, which count from 0."""
    if depths and arch is not None and max(depths) >= arch.depth:
        cause = f"block {max(depths)} does not exist, the {who} has {arch.depth}"
        yield Problem(key, cause, f"use 0 to {arch.depth - 1}")


def tower(who: str, *, width: int, num_heads: int) -> Iterator[Problem]:
    """Yield problems for a width that its heads or sin-cos positions do not divide."""
    if width % num_heads:
        cause = f"{num_heads} heads do not divide width {width}"
        yield Problem(f"{who}.num_heads", cause, f"use a divisor of {width}")
    if width % 4:
        cause = f"{width} is not a multiple of 4, as sin-cos positions need"
        yield Problem(f"{who}.width", cause, f"use {width + 4 - width % 4}")
