"""Open a pretrained model with timm: of its own list, a hub, or a folder; its config.json is untrusted input.

"timm:NAME", "hf-hub:ID", "local-dir:PATH" -> open_timm -> the model, with its weights
the model -> image_config -> how its images are resized, cropped and normalised
"""

import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from timm.data import resolve_model_data_config
from timm.models import load_model_config_from_hf
from timm.models.vision_transformer_sam import VisionTransformerSAM

from maedistill.config.schema import Crop
from maedistill.errors import ConfigError, DataError, UserError
from maedistill.escaping import say
from maedistill.models.meta import meta_device
from maedistill.models.vits import TimmModel, require_known
from maedistill.weights.from_file import READ_ERRORS, Inspect, why_unreadable

_CONFIG = "config.json"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
MOST_BLOCKS, LARGEST = 1_000, 1_000_000  # of a network; LARGEST bounds width, image size and every other number
_ANY_FILE = 4096  # numbers up to this are not compared with the weights: image sizes have no tensor of their size
Side = Annotated[int, Field(ge=1, le=LARGEST)]
_Share = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(allow_inf_nan=False, gt=0)]
Mean = tuple[_Share, _Share, _Share]  # of pixels in [0, 1]
Std = tuple[Deviation, Deviation, Deviation]
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"]
CropMode = Literal["center", "squash", "border"]


class StrictModel(BaseModel):
    """The base of untrusted entries. Strict, so that no value is converted; unknown entries are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class ImageConfig(StrictModel):
    """How timm resizes, crops and normalises the images of a network."""

    input_size: tuple[Literal[3], Side, Side]
    mean: Mean
    std: Std
    crop_pct: Crop
    interpolation: Interpolation
    crop_mode: CropMode


def open_timm(source: str, inspect_network: Inspect, *, pretrained: bool = True) -> tuple[TimmModel, int | None]:
    """Return the model, and the image size that `inspect_network` chose; timm resamples positions to it.

    Without `pretrained` the weights are random, the same every time. The classifier is loaded too: without one, timm
    would accept a file that lacks keys. Raises ConfigError for a name that timm does not have, DataError for weights
    that cannot be loaded, or whose config.json describes an absurdly large network.
    """
    address = source.removeprefix("timm:")
    if address != source:
        require_known(address)
    with read_errors(source):
        kind, _, name = address.partition(":")
        if kind == "hf-hub":
            require_moderate(load_model_config_from_hf(name)[2])
        elif kind == "local-dir":
            folder = Path(os.path.expanduser(name))
            config = json.loads((folder / _CONFIG).read_bytes())
            require_claims(require_moderate(config.get("model_args") or {}), folder / "model.safetensors")
        with meta_device():  # takes neither memory nor time, and loads no weights
            shape: TimmModel = timm.create_model(address, pretrained=False)
        own, stated = shape.num_classes, shape.pretrained_cfg.get("num_classes")
        if kind in ("hf-hub", "local-dir") and own not in (0, stated):
            raise DataError(
                f"{source}: its config.json gives the network {own} classes, and its weights {stated}",
                "write the true num_classes into both, model_args and pretrained_cfg: timm would leave the head random",
            )
        image_size = inspect_network(shape)
        if pretrained and kind not in ("hf-hub", "local-dir"):
            announce_download(source, shape.pretrained_cfg.get("hf_hub_id"))
        takes_size = "img_size" in inspect.signature(type(shape)).parameters  # other networks accept any size
        # SAM does too: it resamples its positions at every pass, and its weights load at their own size only.
        takes_size = takes_size and not isinstance(shape, VisionTransformerSAM)
        arguments: dict[str, Any] = {"img_size": image_size} if image_size and takes_size else {}
        with torch.random.fork_rng(devices=[], enabled=not pretrained):
            if not pretrained:
                torch.manual_seed(0)
            return timm.create_model(address, pretrained=pretrained, **arguments).eval(), image_size


@contextmanager
def read_errors(source: str) -> Iterator[None]:
    """Turn errors of reading or downloading a source into a DataError that names it."""
    try:
        yield
    except UserError:
        raise
    except (HfHubHTTPError, *READ_ERRORS) as error:
        remedy = "check its name, the connection, and the image size if there is one; or use a copy: local-dir:PATH"
        if source.startswith("local-dir:"):
            remedy = (
                'name a folder with model.safetensors and a config.json such as {"architecture": "convnext_tiny", '
                '"num_classes": 0}, where 0 means no classifier'
            )
        raise DataError(f"{source} cannot be opened ({why_unreadable(error)})", remedy) from error


def announce_download(source: str, hub_id: str | None) -> None:
    """Name the alternatives before a download, which takes long and is retried without a network."""
    if hub_id and not any(isinstance(try_to_load_from_cache(hub_id, file), str) for file in _HUB_FILES):
        say(f"downloading {source}; offline? name a copy instead (local-dir:FOLDER, or file:PATH of a ViT)", error=True)


def image_config(network: TimmModel, source: str, *, test: bool = False) -> ImageConfig:
    """Validate the image config that timm resolves for a network; test: the one of its published accuracy.

    Raises ConfigError for images that are not square or have other channels, DataError for values that cannot be true.
    """
    values, stated = resolve_model_data_config(network, use_test_size=test), network.pretrained_cfg
    # timm takes zeros and empty entries for entries that are not there
    values |= {name: stated[name] for name in values if stated.get(name) in (0, "", [], ())}
    if test and stated.get("test_crop_pct") == 0:
        values["crop_pct"] = 0
    if list(values["input_size"])[:1] != [3] or len({*values["input_size"][1:]}) != 1:
        size = " x ".join(map(str, values["input_size"]))[:60]
        raise ConfigError(f"{source} takes images of {size} pixels", "use a model of square images with 3 channels")
    try:
        return ImageConfig.model_validate_json(json.dumps(values, default=str))
    except (ValueError, RecursionError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else str(error)[:200]
        raise DataError(
            f"{source}: its config gives its {'test ' if test else ''}images impossible values: {problem}",
            "correct its config.json",
        ) from None


def stated_exif(source: str) -> Literal["ignore", "apply"]:
    """Return whether photographs are turned upright, which config.json of our exports states besides timm's."""
    kind, _, name = source.partition(":")
    if kind not in ("hf-hub", "local-dir"):
        return "ignore"
    with read_errors(source):
        file = os.path.join(os.path.expanduser(name), _CONFIG)
        if kind == "hf-hub":
            hub_id, _, revision = name.partition("@")
            file = hf_hub_download(hub_id, _CONFIG, revision=revision or None)
        return "apply" if json.loads(Path(file).read_bytes()).get("exif") == "apply" else "ignore"


def require_moderate(arguments: dict[str, Any]) -> dict[str, Any]:
    """Check untrusted arguments for timm. Raises ValueError if a number is absurdly large, such as a depth > 1,000."""
    for name, value in arguments.items():
        most = MOST_BLOCKS if name == "depth" else LARGEST
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not abs(number) <= most:  # `not <=` also rejects nan
                raise ValueError(f"{name} is {number}, more than {most:,}")
    return arguments


def require_claims(arguments: dict[str, Any], weights: Path) -> None:
    """Compare untrusted arguments for timm with the header of the weights file, before a network is built.

    Building a network of a thousand wide blocks takes a minute and gigabytes even without its weights. Raises
    ValueError for more blocks than the file has tensors, or a number above its largest dimension. No file, no check.
    """
    if not weights.is_file():
        return
    with safe_open(weights, framework="pt") as stored:
        shapes = [stored.get_slice(key).get_shape() for key in stored.keys()]  # noqa: SIM118
    largest = max((side for shape in shapes for side in shape), default=0)
    for name, value in arguments.items():
        most = len(shapes) if name.startswith("depth") else max(largest, _ANY_FILE)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and number > most:
                raise ValueError(f"{name} is {number}, but the largest that {weights.name} can hold is {most:,}")


def first_problem(error: ValidationError) -> str:
    """Return where validation failed first, and why, short enough for an error message."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))[:100]
    return f"{place}: {first['msg'][:200]}" if place else first["msg"][:200]
