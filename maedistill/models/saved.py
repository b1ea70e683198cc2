"""The network in a run folder of ours, as the timm model it is: for evaluation, export, or as a teacher.

RUN/run.json says how timm builds it and how its images are normalised, a checkpoint holds its weights; nothing else of
the run is needed, neither its data nor the teacher or the weights that it began with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
from timm.models import get_model_args
from timm.models.vision_transformer import VisionTransformer

from maedistill.errors import DataError
from maedistill.models.weights import Audit, Imported, load_encoder
from maedistill.training.checkpoint import newest_intact, read_weights
from maedistill.training.run_folder import RunFolder

Weights = Literal["model", "ema"]
PREFIX = {"pretrain": "encoder.vit.", "finetune": "vit."}  # where a stage's module keeps its network


@dataclass(frozen=True)
class Saved:
    """A network with the weights of one checkpoint. facts: RUN/run.json."""

    vit: VisionTransformer
    folder: RunFolder
    facts: Mapping[str, Any]
    checkpoint: Path
    audit: Audit


def describe_network(vit: VisionTransformer) -> dict[str, Any]:
    """What `open_saved` builds a network of this shape from: plain values, `timm.create_model(name, **arguments)`."""
    return {"name": vit.pretrained_cfg["architecture"], "arguments": get_model_args(vit)}


def open_saved(path: str | Path, *, weights: Weights = "model", image_size: int | None = None) -> Saved:
    """The network of a run folder, from its newest intact checkpoint, its positions resampled to `image_size`.

    weights: `ema` for the moving average. Raises DataError for a folder that is no run of ours, holds no checkpoint or
    has no such weights.
    """
    folder = RunFolder(path)
    facts = folder.facts()
    missing = [name for name in ("stage", "network", "input", "licence") if name not in facts]
    if missing:
        what = "does not say its " + ", ".join(missing) if facts else "is not there"
        raise DataError(
            f"{folder.path} holds no run of this version: its run.json {what}",
            "name a run folder that tools/pretrain.py or tools/finetune.py has written",
        )
    checkpoint = newest_intact(folder.checkpoints)
    if checkpoint is None:
        raise DataError(
            f"{folder.path} holds no checkpoint", "name a run folder of tools/pretrain.py or finetune.py that has saved"
        )
    if weights == "ema" and not (checkpoint / "ema.safetensors").is_file():
        raise DataError(f"{folder.path} kept no moving average of its weights", "leave out --ema (optim.ema keeps one)")
    arguments = facts["network"]["arguments"] | ({"img_size": image_size} if image_size else {})
    vit = timm.create_model(facts["network"]["name"], pretrained=False, **arguments)
    prefix, encoder = PREFIX[facts["stage"]], PREFIX["pretrain"]
    tensors = {name: value for name, value in read_weights(checkpoint, weights).items() if name.startswith(prefix)}
    renamed = {encoder + name.removeprefix(prefix): value for name, value in tensors.items()}
    audit = load_encoder(vit, Imported(renamed), name=str(checkpoint))
    return Saved(vit.eval(), folder, facts, checkpoint, audit)
