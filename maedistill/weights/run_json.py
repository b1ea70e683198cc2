"""What a run folder says of its network, believed only as far as it can be true: RUN/run.json may come from anywhere.

    RUN -> read_facts -> its folder, and run.json as a dict that `Facts` has checked

`Facts` names what is read of it by whoever opens, exports or describes the network of a run; other entries stay unread.
"""

import inspect
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from timm.models.vision_transformer import VisionTransformer

from maedistill.errors import DataError
from maedistill.runs.folder import RunFolder

MOST_BLOCKS, LARGEST = 1_000, 1_000_000  # of a network; the second for width, image size and every other number

_ARGUMENTS = frozenset(inspect.signature(VisionTransformer).parameters)
_REMEDY = "name a run folder that tools/pretrain.py or tools/finetune.py has written"
_NEEDED = ("stage", "network", "input", "licence")
Number = Annotated[float, Field(allow_inf_nan=False)]
Deviation = Annotated[float, Field(allow_inf_nan=False, gt=0)]
_Argument = bool | int | float | str | None | list[int]


def require_moderate(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments for timm, from outside. Raises ValueError where the network would be of no size that anybody builds."""
    for name, value in arguments.items():
        most = MOST_BLOCKS if name == "depth" else LARGEST
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not abs(number) <= most:  # nan is no size either
                raise ValueError(f"{name} is {number}, more than {most:,}")
    return arguments


def _require_known(arguments: dict[str, Any]) -> dict[str, Any]:
    """Only what describes the network itself: timm's `create_model` would also take files and places to load from."""
    if foreign := sorted(arguments.keys() - _ARGUMENTS):
        raise ValueError(f"{foreign[0]!r} is no part of a network")
    return arguments


def _require_model(name: str) -> str:
    """A name of timm's own, no address."""
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name[:60]!r}")
    return name


class Part(BaseModel):
    """Strict, so that nothing is converted; entries that nobody reads may be there."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Network(Part):
    """`timm.create_model(name, **arguments)`."""

    name: Annotated[str, AfterValidator(_require_model)]
    arguments: Annotated[dict[str, _Argument], AfterValidator(_require_known), AfterValidator(require_moderate)]


class Input(Part):
    """What images of the network look like."""

    size: Annotated[int, Field(ge=1, le=LARGEST)]
    mean: tuple[Number, Number, Number]
    std: tuple[Deviation, Deviation, Deviation]
    crop: Annotated[float, Field(gt=0, le=1)]


class Data(Part):
    """Which samples."""

    images: int
    fingerprint: str


class Origin(Part):
    """The run that a run began with, or the run itself."""

    stage: Literal["pretrain", "finetune"]
    method: Literal["mae", "dmae", "amd", "tinymim"] | None = None
    data: Data | None = None
    teacher: str | None = None
    licence: str


class Facts(Origin):
    """RUN/run.json."""

    network: Network
    input: Input
    validation: Data | None = None
    init: str | None = None
    origin: Origin | None = None
    classes: list[str] | None = None


def read_facts(path: str | Path) -> tuple[RunFolder, dict[str, Any]]:
    """A run's folder and its checked run.json. Raises DataError for a folder that is no run of ours."""
    folder = RunFolder(path)
    facts = folder.facts()
    if missing := [name for name in _NEEDED if name not in facts]:
        what = "its run.json does not say its " + ", ".join(missing) if facts else "its run.json is not there"
        what = what if os.path.isdir(folder.path) else "there is no such folder"
        raise DataError(f"{folder.path} holds no run of this version: {what}", _REMEDY)
    try:
        Facts.model_validate_json(json.dumps(facts))  # as JSON: Python's lists would be no tuples
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:100]
        raise DataError(f"{folder.path}/run.json cannot be true: {where}: {first['msg'][:200]}", _REMEDY) from None
    return folder, facts
