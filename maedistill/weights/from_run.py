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
from torch import Tensor

from maedistill.errors import DataError
from maedistill.models.encoder import require_plain_vit
from maedistill.runs.folder import RunFolder
from maedistill.runs.restore import newest_intact, read_weights
from maedistill.weights.run_json import read_facts
from maedistill.weights.state_dict import Audit, ConvertedStateDict, load_encoder

Weights = Literal["model", "ema"]
PREFIX = {"pretrain": "encoder.vit.", "finetune": "vit."}  # of the network's keys in a stage's state dict


@dataclass(frozen=True)
class RunNetwork:
    """A network with the weights of one checkpoint. facts: the content of RUN/run.json."""

    vit: VisionTransformer
    folder: RunFolder
    facts: Mapping[str, Any]
    checkpoint: Path
    audit: Audit


def describe_network(vit: VisionTransformer) -> dict[str, Any]:
    """Return the plain values from which `open_saved` rebuilds it: `timm.create_model(name, **arguments)`."""
    return {"name": vit.pretrained_cfg["architecture"], "arguments": get_model_args(vit)}


def open_saved(path: str | Path, *, weights: Weights = "model", image_size: int | None = None) -> RunNetwork:
    """Open the network of a run folder from its newest intact checkpoint, with positions resampled to `image_size`.

    weights: `ema` for the moving average. Raises DataError if the folder is not a run of this package, holds no
    checkpoint, or lacks these weights.
    """
    folder, facts = read_facts(path)
    checkpoint = newest_intact(folder.checkpoints)
    if checkpoint is None:
        raise DataError(
            f"{folder.path} holds no checkpoint", "name a run folder of tools/pretrain.py or finetune.py that has saved"
        )
    if weights == "ema" and not (checkpoint / "ema.safetensors").is_file():
        raise DataError(f"{folder.path} kept no moving average of its weights", "leave out --ema (optim.ema keeps one)")
    prefix, encoder = PREFIX[facts["stage"]], PREFIX["pretrain"]
    tensors = {name: value for name, value in read_weights(checkpoint, weights).items() if name.startswith(prefix)}
    _require_same_size(facts["network"], tensors, checkpoint)
    arguments = facts["network"]["arguments"] | ({"img_size": image_size} if image_size else {})
    vit = timm.create_model(facts["network"]["name"], pretrained=False, **arguments)
    renamed = {encoder + name.removeprefix(prefix): value for name, value in tensors.items()}
    audit = load_encoder(vit, ConvertedStateDict(renamed), name=str(checkpoint))
    return RunNetwork(vit.eval(), folder, facts, checkpoint, audit)


def _require_same_size(network: Mapping[str, Any], tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Raise DataError unless run.json's network is as large as the checkpoint. Checked before memory is allocated."""
    try:
        with torch.device("meta"):
            shape = timm.create_model(network["name"], pretrained=False, **network["arguments"])
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError, ArithmeticError) as error:
        raise DataError(
            f"{checkpoint.parent.parent}/run.json describes no network that timm can build ({type(error).__name__}: "
            f"{' '.join(str(error)[:200].split())})",
            "name a run folder that tools/pretrain.py or tools/finetune.py has written",
        ) from error
    require_plain_vit(shape, network["name"])
    described, held = (sum(value.numel() for value in part.values()) for part in (shape.state_dict(), tensors))
    if described != held:
        raise DataError(
            f"{checkpoint.parent.parent}/run.json describes a network of {described:,} numbers, but {checkpoint.name} "
            f"holds {held:,}",
            "restore the run folder as it was written: the two belong together",
        )
