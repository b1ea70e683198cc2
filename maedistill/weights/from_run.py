"""Open the network of a run folder as a timm model, for evaluation, for export, or as a teacher.

RUN/run.json states how timm builds the network and how its images are normalised; a checkpoint holds its weights.
Nothing else of the run is needed: neither its data, nor its teacher, nor its initial weights. run.json is untrusted
input: `RunMetadata` validates the entries that opening, exporting or describing a network reads; others are ignored.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
from pydantic import ValidationError
from timm.models import get_model_args
from torch import nn

from maedistill.config.sources import PYTHON_KIND
from maedistill.data.shards.scan import USUAL, Members
from maedistill.errors import ConfigError, DataError
from maedistill.escaping import warn
from maedistill.models.exits import exit_weights
from maedistill.models.meta import meta_device
from maedistill.models.vits import PlainViT, TimmModel, require_plain_vit
from maedistill.runs.checkpoint import checkpoint_steps
from maedistill.runs.folder import RunFolder
from maedistill.runs.manifest import COMPLETE, CorruptCheckpoint, verify
from maedistill.runs.objects import python_name
from maedistill.runs.previous import METADATA
from maedistill.runs.restore import newest_intact, read_weights
from maedistill.runs.state import stated_step
from maedistill.weights.from_file import Inspect
from maedistill.weights.from_timm import first_problem, require_claims
from maedistill.weights.run_metadata import RunMetadata
from maedistill.weights.state_dict import Audit, ConvertedStateDict, load_encoder

Weights = Literal["model", "ema"]
NOT_A_RUN = "name a run folder that maedistill pretrain or maedistill finetune has written"
PREFIX = {"pretrain": "encoder.vit.", "finetune": "vit."}  # of the network's keys in a stage's state dict
EXITS = "terms.exits.heads."  # of the keys of a fine-tuned network's exits, before their block

_NEEDED = ("stage", "network", "input", "license")


@dataclass(frozen=True)
class RunNetwork:
    """A network with the weights of one checkpoint. metadata: the content of RUN/run.json, of a peer with its entries.
    exit: the block it ends at, None for the whole network. peer: its number, 0 for the run's own student.
    """

    vit: PlainViT
    folder: RunFolder
    metadata: Mapping[str, Any]
    checkpoint: Path
    audit: Audit
    exit: int | None = None
    peer: int = 0


def validated_metadata(folder: RunFolder) -> dict[str, Any]:
    """Return a folder's run.json, whoever wrote it. Raises DataError unless it is that of a run of this package."""
    metadata = _stated(folder)
    if str(metadata["network"].get("name", "")).startswith(f"{PYTHON_KIND}:"):
        raise DataError(
            f"{folder.path} holds a student given from Python ({str(metadata['network']['name'])[:100]})",
            "make one of this class and load it: maedistill.load_backbone(RUN, student=...); evaluate and finetune "
            "take it, export takes only networks of timm",
        )
    try:
        RunMetadata.model_validate_json(json.dumps(metadata))  # as JSON: strict mode would reject lists as tuples
    except ValidationError as error:
        raise DataError(f"{folder.path}/run.json is not valid: {first_problem(error)}", NOT_A_RUN) from None
    return metadata


def _stated(folder: RunFolder) -> dict[str, Any]:
    """Return the run.json of a folder, of which the stage is valid. Raises DataError if it is not a run."""
    metadata = folder.metadata()
    if missing := [name for name in _NEEDED if name not in metadata]:
        cause = "its run.json does not say its " + ", ".join(missing) if metadata else "its run.json is not there"
        cause = cause if os.path.isdir(folder.path) else "there is no such folder"
        raise DataError(f"{folder.path} holds no run of this version: {cause}", NOT_A_RUN)
    is_stage = metadata["stage"] in [*PREFIX]  # a list, since what is stated may have no hash
    for name, is_true in (("stage", is_stage), ("network", isinstance(metadata["network"], dict))):
        if not is_true:
            raise DataError(f"{folder.path}/run.json is not valid: {name}", NOT_A_RUN)
    return metadata


def describe_network(module: nn.Module) -> dict[str, Any]:
    """Return the plain values from which `open_run` rebuilds it: `timm.create_model(name, **arguments)`.

    A module that timm cannot build has its class as name, `python:MODULE.CLASS`.
    """
    if not isinstance(module, PlainViT) or not hasattr(module, "_model_args"):  # timm's record of arguments
        return {"name": python_name(module), "arguments": {}}
    config: Any = module.pretrained_cfg
    return {"name": config["architecture"], "arguments": get_model_args(module)}


def build_run(path: str | Path) -> tuple[PlainViT, dict[str, Any]]:
    """Build the network of a run folder without its weights; return it and the content of run.json.

    Raises DataError if the folder is not a run of this package.
    """
    folder = RunFolder(path)
    metadata = validated_metadata(folder)
    name, arguments = metadata["network"]["name"], metadata["network"]["arguments"]
    _unloaded(folder, name, arguments)  # checked before memory is allocated
    vit: Any = timm.create_model(name, pretrained=False, **arguments)
    return vit, metadata


def open_run(
    path: str | Path,
    *,
    weights: Weights = "model",
    exit: int | None = None,
    peer: int = 0,
    inspect_network: Inspect = lambda shape: None,
) -> RunNetwork:
    """Open the network of a run folder from its newest intact checkpoint, or of one checkpoint, RUN/checkpoints/step_N.

    weights: `ema` for the moving average. exit: the block of an exit at which the network ends. peer: number of a
    student of mutual learning, 0 for the run's own. inspect_network: chooses the image size that positions are
    resampled to. Raises ConfigError if there is no such exit or peer, DataError if the folder is not a run of this
    package, holds no checkpoint, or lacks these weights.
    """
    folder = RunFolder(path)
    metadata = validated_metadata(folder)
    prefix = PREFIX[metadata["stage"]]
    if peer:
        metadata, prefix = metadata | _peer_entry(folder, metadata, peer), f"peers.{peer - 1}."
    name, arguments = metadata["network"]["name"], metadata["network"]["arguments"]
    if exit is not None:
        _require_exit(folder, metadata, exit)
        arguments = arguments | {"depth": exit + 1 + metadata.get("exits_own_block", False)}
    is_checkpoint = (folder.path / COMPLETE).is_file()  # it has a copy of run.json
    checkpoint = _intact(folder.path) if is_checkpoint else newest_intact(folder.checkpoints)
    if checkpoint is None:
        raise DataError(
            f"{folder.path} holds no checkpoint", "name a run folder of maedistill pretrain or finetune that has saved"
        )
    if weights == "ema" and not (checkpoint / "ema.safetensors").is_file():
        raise DataError(
            f"{folder.path} kept no moving average of its weights",
            "leave out --ema or weights=ema (optim.ema keeps one)",
        )
    try:
        require_claims(arguments, checkpoint / "model.safetensors")
    except ValueError as error:
        raise DataError(f"{folder.path}/run.json is not valid: {error}", NOT_A_RUN) from None
    shape = _unloaded(folder, name, arguments)
    image_size = inspect_network(shape)
    stored = ConvertedStateDict(read_weights(checkpoint, weights))
    own = stored.part(prefix)
    if exit is not None:
        own = exit_weights(own, head=stored.part(f"{EXITS}{exit}."), block=exit)
    tensors = {PREFIX["pretrain"] + key: value for key, value in own.items()}
    described, held = (sum(value.numel() for value in part.values()) for part in (shape.state_dict(), tensors))
    if described != held:  # checked before memory is allocated
        raise DataError(
            f"{folder.path}/run.json describes a network of {described:,} numbers, but {checkpoint.name} holds "
            f"{held:,}",
            "restore the run folder as it was written: the two belong together",
        )
    size = {"img_size": image_size} if image_size else {}
    vit: TimmModel = timm.create_model(name, pretrained=False, **arguments | size)
    audit = load_encoder(vit, ConvertedStateDict(tensors), name=str(checkpoint))
    return RunNetwork(vit.eval(), folder, metadata, checkpoint, audit, exit, peer)


def run_members(path: str | Path) -> Members:
    """Return which members of a sample a run used as image and label; the usual ones without config.yaml."""
    folder = RunFolder(path)
    if not folder.config.exists():
        return USUAL
    data = folder.load_config().data
    return Members(data.image_key, data.label_key)


def kept_checkpoints(path: str | Path) -> list[tuple[int, Path]]:
    """Return the step and folder of each checkpoint of a run whose weights are intact, oldest first; warn of others.

    path: of a run, or of one of its checkpoints, which is returned alone. `open_run` opens each. Raises DataError if
    the folder is not a run of this package or holds no such checkpoint.
    """
    folder = RunFolder(path)
    validated_metadata(folder)
    one = [(stated_step(folder.path) or 0, folder.path)] if (folder.path / COMPLETE).is_file() else []
    kept = []
    for step, checkpoint in one or sorted(checkpoint_steps(folder.checkpoints)):
        try:
            kept.append((step, _intact(checkpoint)))
        except DataError as problem:
            warn(f"{problem.cause}: skipped")
    if not kept:
        raise DataError(
            f"{folder.path} keeps no intact checkpoint",
            "train with log.keep and log.save_every_epochs, which keep some",
        )
    return kept


def _intact(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint. Raises DataError unless its run.json and weights match its manifest."""
    try:
        for name in (METADATA, "model.safetensors"):
            verify(checkpoint, only=name)
    except CorruptCheckpoint as problem:
        raise DataError(f"{checkpoint} is damaged ({problem})", "name another one, or copy it again") from problem
    return checkpoint


def _require_exit(folder: RunFolder, metadata: Mapping[str, Any], exit: int) -> None:
    """Raise ConfigError unless the run trained an exit after this block."""
    exits = metadata.get("exits", [])
    if exit not in exits:
        has = f"its exits are after blocks {', '.join(map(str, exits))}" if exits else "it was trained without exits"
        remedy = "name one of these" if exits else "leave out --exit, or fine-tune with student.exits"
        raise ConfigError(f"--exit: {folder.path} has no exit after block {exit}, {has}", remedy)


def _peer_entry(folder: RunFolder, metadata: Mapping[str, Any], peer: int) -> dict[str, Any]:
    """Return the metadata in which a peer differs. Raises ConfigError unless the run trained it."""
    peers = metadata.get("peers", [])
    if not 0 < peer <= len(peers):
        numbers = "only 1" if len(peers) == 1 else f"1 to {len(peers)}"
        has = f"it has {numbers}" if peers else "it was trained without peers"
        remedy = "name one of these" if peers else "leave out --peer, or fine-tune with distill.mutual"
        raise ConfigError(f"--peer: {folder.path} has no peer {peer}, {has}", remedy)
    return peers[peer - 1]


def load_into(student: nn.Module, path: str | Path, *, weights: Weights = "model") -> nn.Module:
    """Set the weights of a caller's module to those of the run that it was the student of; return it in eval mode.

    Raises DataError if the folder is not a run, holds no checkpoint, or its student has other weights than the module.
    """
    folder = RunFolder(path)
    metadata = _stated(folder)
    checkpoint = newest_intact(folder.checkpoints)
    if checkpoint is None:
        raise DataError(f"{folder.path} holds no checkpoint", "name a run folder that has saved")
    prefix = {"pretrain": "encoder.", "finetune": "vit."}[metadata["stage"]]
    try:
        student.load_state_dict(ConvertedStateDict(read_weights(checkpoint, weights)).part(prefix))
    except RuntimeError as error:
        raise DataError(
            f"{checkpoint} does not fit a {type(student).__name__} ({' '.join(str(error)[:200].split())})",
            f"build the student as in that run, a {metadata['network']['name']}",
        ) from error
    return student.eval()


def _unloaded(folder: RunFolder, name: str, arguments: Mapping[str, Any]) -> PlainViT:
    """Build run.json's network without memory. Raises DataError unless timm can build it and it is a plain ViT."""
    try:
        with meta_device():
            shape = timm.create_model(name, pretrained=False, **arguments)
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError, ArithmeticError) as error:
        raise DataError(
            f"{folder.path}/run.json describes no network that timm can build ({type(error).__name__}: "
            f"{' '.join(str(error)[:200].split())})",
            NOT_A_RUN,
        ) from error
    return require_plain_vit(shape, name)
