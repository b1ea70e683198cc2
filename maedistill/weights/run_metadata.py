"""What RUN/run.json must say about a network: untrusted input, whose other entries are ignored."""

import inspect
from typing import Annotated, Any, Literal

import timm
from pydantic import AfterValidator, Field
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from maedistill.config.schema import Crop
from maedistill.weights.from_timm import MOST_BLOCKS, Mean, Side, Std, StrictModel, require_moderate

_PARAMETERS = frozenset(name for kind in (VisionTransformer, Eva) for name in inspect.signature(kind).parameters)
_Argument = bool | int | float | str | None | list[int]


def _require_known(arguments: dict[str, Any]) -> dict[str, Any]:
    """Reject arguments other than a plain ViT's: `create_model` also accepts files and URLs to load from."""
    if foreign := sorted(arguments.keys() - _PARAMETERS):
        raise ValueError(f"{foreign[0]!r} is no part of a network")
    return arguments


def _require_model(name: str) -> str:
    """Reject names that timm does not know, such as hub addresses."""
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name[:60]!r}")
    return name


class NetworkEntry(StrictModel):
    """The arguments of `timm.create_model(name, **arguments)`."""

    name: Annotated[str, AfterValidator(_require_model)]
    arguments: Annotated[dict[str, _Argument], AfterValidator(_require_known), AfterValidator(require_moderate)]


class InputEntry(StrictModel):
    """The preprocessing of the network's images."""

    size: Side
    mean: Mean
    std: Std
    crop: Crop
    exif: Literal["ignore", "apply"] = "ignore"


class DataEntry(StrictModel):
    """The samples that were used."""

    images: int
    fingerprint: str


class Origin(StrictModel):
    """The run that a run started from, or the run itself."""

    stage: Literal["pretrain", "finetune"]
    method: Literal["mae", "dmae", "amd", "tinymim"] | None = None
    method_class: str | None = None
    method_arguments: dict[str, str] | None = None
    data: DataEntry | None = None
    teacher: str | None = None
    license: str


class PeerEntry(StrictModel):
    """A student that was trained with the run's own, by mutual learning."""

    network: NetworkEntry
    init: str | None = None
    origin: Origin | None = None


class CodistillationEntry(StrictModel):
    """The steps in which a run exchanges weights with others, `every` from `first` to `last`, and what these check."""

    peers: tuple[str, ...]
    every: Annotated[int, Field(ge=1)]
    first: Annotated[int, Field(ge=0)]
    last: Annotated[int, Field(ge=0)]
    seed: int
    license: str


class RunMetadata(Origin):
    """The content of RUN/run.json."""

    network: NetworkEntry
    input: InputEntry
    validation: DataEntry | None = None
    init: str | None = None
    origin: Origin | None = None
    classes: list[str] | None = None
    exits: tuple[Annotated[int, Field(ge=0, lt=MOST_BLOCKS)], ...] = ()
    exits_own_block: bool = False
    peers: tuple[PeerEntry, ...] = ()
    codistillation: CodistillationEntry | None = None
