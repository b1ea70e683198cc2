"""Open a ViT that transformers saved: a folder, or a hub's; all of its files are untrusted input.

config.json -> heads, eps of the norms    preprocessor_config.json -> mean, std    the weights' shapes -> all else
"""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from huggingface_hub import hf_hub_download, snapshot_download
from pydantic import Field, ValidationError

from maedistill.errors import DataError
from maedistill.models.vits import PlainViT
from maedistill.weights.from_file import EncoderSpec, Inspect, open_file
from maedistill.weights.from_timm import (
    Deviation,
    Mean,
    Side,
    Std,
    StrictModel,
    announce_download,
    first_problem,
    read_errors,
)
from maedistill.weights.key_styles import TRANSFORMERS_EPS

_CONFIG, _PROCESSOR = "config.json", "preprocessor_config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PLACEHOLDER = re.compile(r"LABEL_\d+")  # what transformers calls classes without a name


class _Config(StrictModel):
    """What the weights do not tell of a network, or what is the same for all that can be opened."""

    model_type: Literal["vit", "vit_mae", "vit_msn"]
    num_attention_heads: Side = 12
    layer_norm_eps: Deviation = TRANSFORMERS_EPS
    hidden_act: Literal["gelu"] = "gelu"
    id2label: dict[str, str] = Field(default_factory=dict)


class _Processor(StrictModel):
    """The normalisation of images. Pixels in [0, 255] become [0, 1] first, as everywhere here."""

    do_normalize: Literal[True] = True
    rescale_factor: Annotated[float, Field(ge=0.9999 / 255, le=1.0001 / 255)] = 1 / 255
    image_mean: Mean
    image_std: Std


def transformers_folder(source: str) -> Path | None:
    """Return the folder of a `local-dir:` or `hf-hub:` network that transformers saved; None for any other source.

    Raises DataError if its config.json cannot be had or read.
    """
    kind, _, name = source.partition(":")
    if kind not in ("hf-hub", "local-dir"):
        return None
    hub_id, _, revision = name.partition("@")
    where: dict[str, Any] = {"repo_id": hub_id, "revision": revision or None}
    with read_errors(source):
        folder = Path(os.path.expanduser(name))
        if kind == "hf-hub":
            announce_download(source, hub_id)
            folder = Path(hf_hub_download(filename=_CONFIG, **where)).parent
        config = json.loads((folder / _CONFIG).read_bytes())
        if "model_type" not in config or "architecture" in config:  # timm's, which names the architecture
            return None
        for weights in _WEIGHTS if kind == "hf-hub" else ():
            folder = Path(snapshot_download(**where, allow_patterns=[_CONFIG, _PROCESSOR, weights]))
            if (folder / weights).is_file():
                break
    return folder


def open_transformers(
    folder: Path, source: str, inspect_network: Inspect, *, classifies: bool
) -> tuple[PlainViT, str, dict[str, Any]]:
    """Return the network, without pooler and decoder; which keys were loaded; and mean, std and class names if stated.

    classifies: keep the classifier, if there is one. Raises DataError for networks other than ViT, ViTMAE and ViTMSN,
    and for files that do not fit.
    """
    try:
        config = _Config.model_validate_json((folder / _CONFIG).read_bytes())
        states_images = (folder / _PROCESSOR).is_file()
        image = _Processor.model_validate_json((folder / _PROCESSOR).read_bytes()) if states_images else None
    except ValidationError as error:
        raise DataError(
            f"{source}: its transformers config has values that cannot be opened here: {first_problem(error)}",
            "use these weights as timm has them (timm:NAME), or a ViT, ViTMAE or ViTMSN of transformers",
        ) from None
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), folder / _WEIGHTS[0])
    spec = EncoderSpec(num_heads=config.num_attention_heads, eps=config.layer_norm_eps)
    vit, audit = open_file(str(file), spec, inspect_network, section=None, classifies=classifies)
    stated: dict[str, Any] = {"mean": image.image_mean, "std": image.image_std} if image else {}
    names = tuple(config.id2label.get(str(label), "") for label in range(vit.num_classes))
    if all(names) and not all(map(_PLACEHOLDER.fullmatch, names)):
        stated["classes"] = names
    return vit, audit, stated
