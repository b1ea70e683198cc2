"""Open a pretrained model with timm: of its own list, a hub, or a folder; its config.json is untrusted input.

"timm:NAME", "hf-hub:ID", "local-dir:PATH" -> open_timm -> the model, with its weights
the model -> image_config -> how its images are resized, cropped and normalised
"""

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from pydantic import Field, ValidationError
from timm.data import resolve_model_data_config
from timm.models import load_model_config_from_hf
from torch import nn

from maedistill.errors import ConfigError, DataError, UserError
from maedistill.models.encoder import require_known
from maedistill.weights.run_json import LARGEST, Deviation, Number, StrictModel, require_moderate
from maedistill.weights.weights_file import READ_ERRORS, why_unreadable

# Called with a network that holds no weights yet: raises if it does not serve, and returns the image size to open it
# at, or None for its own.
Inspect = Callable[[nn.Module], int | None]
_Side = Annotated[int, Field(ge=1, le=LARGEST)]


class ImageConfig(StrictModel):
    """How timm resizes, crops and normalises the images of a network."""

    input_size: tuple[Literal[3], _Side, _Side]
    mean: tuple[Number, Number, Number]
    std: tuple[Deviation, Deviation, Deviation]
    crop_pct: Annotated[float, Field(gt=0, le=1)]
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"]
    crop_mode: Literal["center", "squash", "border"]


def open_timm(source: str, inspect_network: Inspect) -> tuple[nn.Module, int | None]:
    """Return the pretrained model, and the image size that `inspect_network` chose; timm resamples positions to it.

    The classifier is loaded too: without one, timm would accept a file that lacks keys. Raises ConfigError for a name
    that timm does not have, DataError for weights that cannot be loaded.
    """
    address = source.removeprefix("timm:")
    if address != source:
        require_known(address)
    try:
        _require_moderate_network(address)
        with torch.device("meta"):  # takes neither memory nor time, and loads no weights
            shape = timm.create_model(address, pretrained=False)
        image_size = inspect_network(shape)
        takes_size = "img_size" in inspect.signature(type(shape)).parameters  # other networks accept any size
        arguments = {"img_size": image_size} if image_size and takes_size else {}
        return timm.create_model(address, pretrained=True, **arguments).eval(), image_size
    except UserError:
        raise
    except (HfHubHTTPError, *READ_ERRORS) as error:
        raise DataError(
            f"{source} cannot be opened ({why_unreadable(error)})",
            "check its name, the network, and the image size if you gave one; or download it and use local-dir:PATH",
        ) from error


def image_config(network: nn.Module, source: str) -> ImageConfig:
    """Validate the image config that timm resolves for a network.

    Raises ConfigError for images that are not square or have other channels, DataError for values that cannot be true.
    """
    values = resolve_model_data_config(network)
    if list(values["input_size"])[:1] != [3] or len({*values["input_size"][1:]}) != 1:
        size = " x ".join(map(str, values["input_size"]))[:60]
        raise ConfigError(f"{source} looks at {size} pixels", "use a model of square images with 3 channels")
    try:
        return ImageConfig.model_validate_json(json.dumps(values, default=str))
    except (ValidationError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))[:100]
        raise DataError(
            f"{source}: its config says of its images what cannot be: {where}: {first['msg'][:200]}",
            "correct its config.json",
        ) from None


def _require_moderate_network(address: str) -> None:
    """Raise ValueError if the config.json of a `local-dir:` or `hf-hub:` describes an absurdly large network.

    Errors of reading the file are passed on.
    """
    kind, _, name = address.partition(":")
    if kind == "hf-hub":
        require_moderate(load_model_config_from_hf(name)[2])
    elif kind == "local-dir":
        config = json.loads(Path(os.path.expanduser(name), "config.json").read_bytes())
        require_moderate(config.get("model_args") or {})
