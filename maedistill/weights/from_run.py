"""Open the network of a run folder as a timm model, for evaluation, for export, or as a teacher.

RUN/run.json states how timm builds the network and how its images are normalised; a checkpoint holds its weights.
Nothing else of the run is needed: neither its data, nor its teacher, nor its initial weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import get_model_args
from timm.models.vision_transformer import VisionTransformer

from maedistill.errors import DataError
from maedistill.models.encoder import require_plain_vit
from maedistill.runs.folder import RunFolder
from maedistill.runs.restore import newest_intact, read_weights
from maedistill.weights.from_timm import Inspect
from maedistill.weights.run_json import NOT_A_RUN, read_metadata
from maedistill.weights.state_dict import Audit, ConvertedStateDict, load_encoder

Weights = Literal["model", "ema"]
PREFIX = {"pretrain": "encoder.vit.", "finetune": "vit."}  # of the network's keys in a stage's state dict


@dataclass(frozen=True)
class RunNetwork:
    """A network with the weights of one checkpoint. metadata: the content of RUN/run.json."""

    vit: VisionTransformer
    folder: RunFolder
    metadata: Mapping[str, Any]
    checkpoint: Path
    audit: Audit


def describe_network(vit: VisionTransformer) -> dict[str, Any]:
    """Return the plain values from which `open_run` rebuilds it: `timm.create_model(name, **arguments)`."""
    return {"name": vit.pretrained_cfg["architecture"], "arguments": get_model_args(vit)}


def open_run(
    path: str | Path, *, weights: Weights = "model", inspect_network: Inspect = lambda shape: None
) -> RunNetwork:
    """Open the network of a run folder from its newest intact checkpoint.

    weights: `ema` for the moving average. inspect_network: chooses the image size that positions are resampled to.
    Raises DataError if the folder is not a run of this package, holds no checkpoint, or lacks these weights.
    """
    folder, metadata = read_metadata(path)
    name, arguments = metadata["network"]["name"], metadata["network"]["arguments"]
    shape = _unloaded(folder, name, arguments)
    image_size = inspect_network(shape)
    checkpoint = newest_intact(folder.checkpoints)
    if checkpoint is None:
        raise DataError(
            f"{folder.path} holds no checkpoint", "name a run folder of tools/pretrain.py or finetune.py that has saved"
        )
    if weights == "ema" and not (checkpoint / "ema.safetensors").is_file():
        raise DataError(f"{folder.path} kept no moving average of its weights", "leave out --ema (optim.ema keeps one)")
    prefix, encoder = PREFIX[metadata["stage"]], PREFIX["pretrain"]
    tensors = {key: value for key, value in read_weights(checkpoint, weights).items() if key.startswith(prefix)}
    described, held = (sum(value.numel() for value in part.values()) for part in (shape.state_dict(), tensors))
    if described != held:  # checked before memory is allocated
        raise DataError(
            f"{folder.path}/run.json describes a network of {described:,} numbers, but {checkpoint.name} holds "
            f"{held:,}",
            "restore the run folder as it was written: the two belong together",
        )
    vit = timm.create_model(name, pretrained=False, **arguments | ({"img_size": image_size} if image_size else {}))
    renamed = {encoder + key.removeprefix(prefix): value for key, value in tensors.items()}
    audit = load_encoder(vit, ConvertedStateDict(renamed), name=str(checkpoint))
    return RunNetwork(vit.eval(), folder, metadata, checkpoint, audit)


def _unloaded(folder: RunFolder, name: str, arguments: Mapping[str, Any]) -> VisionTransformer:
    """Build run.json's network without memory. Raises DataError unless timm can build it and it is a plain ViT."""
    try:
        with torch.device("meta"):
            shape = timm.create_model(name, pretrained=False, **arguments)
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError, ArithmeticError) as error:
        raise DataError(
            f"{folder.path}/run.json describes no network that timm can build ({type(error).__name__}: "
            f"{' '.join(str(error)[:200].split())})",
            NOT_A_RUN,
        ) from error
    require_plain_vit(shape, name)
    return shape
