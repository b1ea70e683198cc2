"""Modules and data sets that a Python caller gives where a config can only name sources.

The config of such a run says `python:MODULE.CLASS` at the key that the object stands for, so that a run folder tells
what it was made with, and a start from the command line is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from maedistill.config.schema import ImagesConfig
from maedistill.config.sources import PYTHON_KIND
from maedistill.data.loading.dataset import ImageDataset, open_dataset
from maedistill.data.loading.exif_warning import warn_of_turned
from maedistill.data.remote.cache import require_room
from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.scan import Members
from maedistill.errors import ConfigError
from maedistill.escaping import masked
from maedistill.processes import distributed

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Objects:
    """What the caller gives; None or empty for what the config names. method: see `maedistill.pretrain`."""

    student: nn.Module | None = None
    teachers: tuple[nn.Module, ...] = ()
    dataset: ImageDataset | None = None
    val_dataset: ImageDataset | None = None
    method: Callable[..., nn.Module] | None = None


NOTHING = Objects()


def class_name(given: object) -> str:
    """Return MODULE.CLASS of a class or function, or of the class of any other object."""
    named: Any = given if hasattr(given, "__qualname__") else getattr(given, "func", type(given))
    return f"{named.__module__}.{named.__qualname__}"


def arguments_of(make: object) -> dict[str, str]:
    """Return the arguments that a `functools.partial` holds: plain values as Python writes them, others by class."""
    if not isinstance(make, partial):
        return {}
    given = {**{str(place): value for place, value in enumerate(make.args)}, **make.keywords}
    return {name: masked(repr(value)) if _is_plain(value) else class_name(value) for name, value in given.items()}


def _is_plain(value: object) -> bool:
    """Return whether the text of a value is the same at each start, which has no address in it."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(one) for pair in value.items() for one in pair)
    return value is None or isinstance(value, bool | int | float | str)


def python_name(given: object) -> str:
    """Return how a config names an object of the caller's: `python:MODULE.CLASS`."""
    return f"{PYTHON_KIND}:{class_name(given)}"


def trainable(module: Module) -> Module:
    """Put a module that may have a caller's student in it into training mode, with weights in fp32.

    Raises ConfigError for parameters that do not learn.
    """
    if frozen := [name for name, parameter in module.named_parameters() if not parameter.requires_grad]:
        cause = f"student: {len(frozen)} of its parameters do not learn, e.g. {frozen[0]}"
        raise ConfigError(cause, "call requires_grad_(True) on them; make what is fixed a buffer")
    is_half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in module.parameters())
    return (module.float() if is_half else module).train()


def open_samples(data: ImagesConfig, objects: Objects) -> tuple[ShardIndex, ShardIndex | None]:
    """Return the indexes of the training and the validation images, of shards or of the caller's data sets.

    The second is None if neither the config nor the caller names any.
    """
    members = Members(data.image_key, data.label_key)
    open_images = partial(open_index, members=members, apply_exif=data.exif == "apply")
    require_object("data.train", data.train, objects.dataset, argument="dataset")
    require_object("data.val", data.val, objects.val_dataset, argument="val_dataset")
    if objects.dataset is not None:
        index: ShardIndex = open_dataset(objects.dataset, class_name(objects.dataset))
    else:
        index = open_images(data.train, index=data.index)
        require_room(index.shards, index.shard_bytes, window=data.shuffle_window)
        if distributed.is_main():
            warn_of_turned(index)
    if objects.val_dataset is not None:
        return index, open_dataset(objects.val_dataset, class_name(objects.val_dataset))
    return index, open_images(data.val, split="val") if data.val else None


def require_object(key: str, value: str | None, given: object, *, argument: str) -> None:
    """Raise ConfigError if the config says `python:...` at `key`, but the caller gives no such object."""
    if given is None and value is not None and value.startswith(f"{PYTHON_KIND}:"):
        raise ConfigError(
            f"{key}: {value.removeprefix('python:')} is an object that only a Python program can pass",
            f"start this run from Python, with {argument}=",
        )
