"""Validate RUN/run.json, which is untrusted input, before a network is built from it.

    RUN -> read_metadata -> its folder, and run.json as a dict that `RunMetadata` has validated

`RunMetadata` lists the entries that the code that opens, exports or describes a run's network reads; others are
ignored.
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

MOST_BLOCKS, LARGEST = 1_000, 1_000_000  # of a network; LARGEST bounds width, image size and every other number
NOT_A_RUN = "name a run folder that tools/pretrain.py or tools/finetune.py has written"

_ARGUMENTS = frozenset(inspect.signature(VisionTransformer).parameters)
_NEEDED = ("stage", "network", "input", "license")
Number = Annotated[float, Field(allow_inf_nan=False)]
Deviation = Annotated[float, Field(allow_inf_nan=False, gt=0)]
_Argument = bool | int | float | str | None | list[int]


def require_moderate(arguments: dict[str, Any]) -> dict[str, Any]:
    """Check untrusted arguments for timm. Raises ValueError if a number is absurdly large, such as a depth > 1,000."""
    for name, value in arguments.items():
        most = MOST_BLOCKS if name == "depth" else LARGEST
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not abs(number) <= most:  # `not <=` also rejects nan
                raise ValueError(f"{name} is {number}, more than {most:,}")
    return arguments


def _require_known(arguments: dict[str, Any]) -> dict[str, Any]:
    """Reject arguments other than VisionTransformer's: `create_model` also accepts files and URLs to load from."""
    if foreign := sorted(arguments.keys() - _ARGUMENTS):
        raise ValueError(f"{foreign[0]!r} is no part of a network")
    return arguments


def _require_model(name: str) -> str:
    """Reject names that timm does not know, such as hub addresses."""
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name[:60]!r}")
    return name


class StrictModel(BaseModel):
    """The base of untrusted entries. Strict, so that no value is converted; unknown entries are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class NetworkEntry(StrictModel):
    """The arguments of `timm.create_model(name, **arguments)`."""

    name: Annotated[str, AfterValidator(_require_model)]
    arguments: Annotated[dict[str, _Argument], AfterValidator(_require_known), AfterValidator(require_moderate)]


class InputEntry(StrictModel):
    """The preprocessing of the network's images."""

    size: Annotated[int, Field(ge=1, le=LARGEST)]
    mean: tuple[Number, Number, Number]
    std: tuple[Deviation, Deviation, Deviation]
    crop: Annotated[float, Field(gt=0, le=1)]


class DataEntry(StrictModel):
    """The samples that were used."""

    images: int
    fingerprint: str


class Origin(StrictModel):
    """The run that a run started from, or the run itself."""

    stage: Literal["pretrain", "finetune"]
    method: Literal["mae", "dmae", "amd", "tinymim"] | None = None
    data: DataEntry | None = None
    teacher: str | None = None
    license: str


class RunMetadata(Origin):
    """The content of RUN/run.json."""

    network: NetworkEntry
    input: InputEntry
    validation: DataEntry | None = None
    init: str | None = None
    origin: Origin | None = None
    classes: list[str] | None = None


def read_metadata(path: str | Path) -> tuple[RunFolder, dict[str, Any]]:
    """Return a run's folder and its validated run.json. Raises DataError if the folder is not a run of this package."""
    folder = RunFolder(path)
    metadata = folder.metadata()
    if missing := [name for name in _NEEDED if name not in metadata]:
        cause = "its run.json does not say its " + ", ".join(missing) if metadata else "its run.json is not there"
        cause = cause if os.path.isdir(folder.path) else "there is no such folder"
        raise DataError(f"{folder.path} holds no run of this version: {cause}", NOT_A_RUN)
    try:
        RunMetadata.model_validate_json(json.dumps(metadata))  # as JSON: strict mode would reject lists as tuples
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:100]
        raise DataError(f"{folder.path}/run.json cannot be true: {where}: {first['msg'][:200]}", NOT_A_RUN) from None
    return folder, metadata
