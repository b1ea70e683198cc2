"""Validate timm's config.json of a folder or of a hub, which is untrusted input.

"local-dir:PATH", "hf-hub:ID" -> require_moderate_network
config resolved by timm       -> image_statistics, image_config
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_model_config_from_hf

from maedistill.errors import DataError
from maedistill.weights.run_json import LARGEST, Deviation, Number, Part, require_moderate

Triple = tuple[float, float, float]
_Side = Annotated[int, Field(ge=1, le=LARGEST)]


class Statistics(Part):
    """Mean and standard deviation that normalise pixels in [0, 1]."""

    mean: tuple[Number, Number, Number] = IMAGENET_DEFAULT_MEAN
    std: tuple[Deviation, Deviation, Deviation] = IMAGENET_DEFAULT_STD


class ImageConfig(Statistics):
    """How timm resizes, crops and normalises the images of a network."""

    input_size: tuple[Literal[3], _Side, _Side]
    crop_pct: Annotated[float, Field(gt=0, le=1)]
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"]
    crop_mode: Literal["center", "squash", "border"]


def require_moderate_network(address: str) -> None:
    """Raise ValueError if the config.json of a `local-dir:` or `hf-hub:` describes an absurdly large network.

    Errors of reading the file are passed on.
    """
    kind, _, name = address.partition(":")
    if kind == "hf-hub":
        require_moderate(load_model_config_from_hf(name)[2])
    elif kind == "local-dir":
        config = json.loads(Path(os.path.expanduser(name), "config.json").read_bytes())
        require_moderate(config.get("model_args") or {})


def image_statistics(known: Mapping[str, Any], source: str) -> tuple[Triple, Triple]:
    """Return the mean and std that `source` states, by default ImageNet's. Raises DataError for invalid values."""
    stated = {name: known[name] for name in ("mean", "std") if known.get(name) is not None}
    found = _checked(Statistics, stated, source)
    return found.mean, found.std


def image_config(resolved: Mapping[str, Any], source: str) -> ImageConfig:
    """Validate the image config that timm resolved for `source`. Raises DataError for invalid values."""
    return _checked(ImageConfig, resolved, source)


def _checked(kind: type[Part], values: Mapping[str, Any], source: str) -> Any:
    try:
        return kind.model_validate_json(json.dumps(values, default=str))
    except (ValidationError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))[:100]
        raise DataError(
            f"{source}: its config says of its images what cannot be: {where}: {first['msg'][:200]}",
            "correct its config.json",
        ) from None
