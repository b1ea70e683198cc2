"""The states of networks that are analysed: every kept checkpoint of a run, or another network as it is.

    RUN, timm:NAME, ... -> find_states -> State -> open_state -> Network whose module gives the features
    all of them -> inspect_states -> image size, grid of cells, and weight distances

Features are the mean over the patches of the last block's output (or of `block`'s), before any norm: the same point of
a network before and after fine-tuning, which moves the final norm behind the mean. With `pool="class"`, they are the
class token there. Of a convolutional network, they are the mean of its last map.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

from torch import Tensor

from maedistill.analysis.seeds import SEED_FOLDER
from maedistill.config.sources import named_source
from maedistill.errors import ConfigError
from maedistill.weights.backbone import Backbone, Pool, has_tokens, open_backbone
from maedistill.weights.from_run import kept_checkpoints
from maedistill.weights.network import Network
from maedistill.weights.state_dict import weights_fingerprint

Opener = Callable[["State"], Network]  # `open_state` with its settings
_CLASSIFIER = "head."  # of the parameters of a plain ViT: pre-training has none


@dataclass(frozen=True)
class State:
    """The network `name` at a step of its training, 0 if it is not a run. source: what opens it."""

    name: str
    step: int
    source: str


@dataclass(frozen=True)
class Inspection:
    """grid: cells along a side. distances: the weight distance up to each state, by network, see `per_image`.

    details: what the features of each state depend on, besides the settings of the command.
    """

    grid: int
    distances: dict[str, list[float]]
    details: list[dict[str, Any]]


def find_states(sources: Sequence[str]) -> list[State]:
    """Return the states of all networks, one after another, oldest first.

    Raises ConfigError for a network that is named twice, DataError for a run without checkpoints.
    """
    paths = [source.rstrip("/") for source in sources]
    named = [named_source(path).partition(":") for path in paths]
    # run:runs/a and ./runs/a are one network
    places = [(kind, os.path.abspath(os.path.expanduser(place))) for kind, _, place in named]
    if twice := next((path for path, place in zip(paths, places, strict=True) if places.count(place) > 1), None):
        raise ConfigError(f"{twice} is named twice", "name each network once")
    paths = [os.path.normpath(one[2]) if one[0] == "run" else path for path, one in zip(paths, named, strict=True)]
    names = [os.path.basename(path) for path in paths]
    if len({*names}) < len(names) or any(map(SEED_FOLDER.search, names)):
        names = _below_common_folder(paths)
    states = []
    for name, path, (kind, _, run) in zip(names, paths, named, strict=True):
        if kind == "run":
            states += [State(name, step, f"run:{checkpoint}") for step, checkpoint in kept_checkpoints(run)]
        else:
            states.append(State(name, 0, path))
    return states


def _below_common_folder(paths: Sequence[str]) -> list[str]:
    """Return the paths without the folders that all of them begin with."""
    parts = [path.split("/") for path in paths]
    columns = zip(*(one[:-1] for one in parts), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len({*column}) == 1, columns))
    return ["/".join(one[shared:]) for one in parts]


def open_state(state: State, *, block: int = -1, image_size: int | None = None, pool: Pool = "mean") -> Network:
    """Open a state, ready to give the features that the head of this file describes, without gradients of weights."""
    network = open_backbone(state.source, image_size=image_size, block=block, pool=pool)
    network.module.requires_grad_(False)
    return network


def inspect_states(states: Sequence[State], opener: Opener, *, grid: int | None) -> Inspection:
    """Open every state once. grid: as the user has set it.

    Raises ConfigError for networks of different image sizes or cells, or for cells that do not divide the image; also
    the errors of `open_backbone`.
    """
    sizes: dict[str, int] = {}
    grids: dict[str, int | None] = {}
    distances: dict[str, list[float]] = {}
    details = []
    for name, group in groupby(states, key=lambda state: state.name):
        before: dict[str, Tensor] = {}
        norm, travelled, distances[name] = 1.0, 0.0, []
        for state in group:
            network = opener(state)
            cells, now = grid or _patch_grid(network), _weights(network)
            if cells and network.size % cells:
                near = max(n for n in range(1, cells) if network.size % n == 0)
                cause = f"--grid: {cells} x {cells} cells do not divide images of {network.size} pixels"
                raise ConfigError(cause, f"use {near}")
            norm = norm if before else _norm(now)
            travelled += _norm({key: value - before[key] for key, value in now.items() if before}) / norm
            before = now
            distances[name].append(travelled)
            entries = {"name": name, "step": state.step, "mean": network.mean, "std": network.std}
            details.append(entries | {"weights_sha256": weights_fingerprint(network.module)})
        sizes[name], grids[name] = network.size, _patch_grid(network)
    own_grids = {name: own for name, own in grids.items() if own and not grid}
    if len({*sizes.values()}) > 1:
        raise ConfigError(f"the networks have different image sizes ({sizes})", "give one: --image-size N")
    if len({*own_grids.values()}) > 1:
        raise ConfigError(f"the networks have different numbers of patches ({own_grids})", "give cells: --grid N")
    if not (cells := grid or next(iter(own_grids.values()), None)):
        raise ConfigError(f"{states[0].name} has no patches that could be cells", "give their number: --grid 16")
    return Inspection(cells, distances, details)


def _patch_grid(network: Network) -> int | None:
    """Return the number of patches along a side, None for a network without square patches."""
    assert isinstance(network.module, Backbone)
    patches = getattr(network.module.network, "patch_embed", None)
    rows, columns = getattr(patches, "grid_size", None) or (0, 1)
    return rows if has_tokens(network.module.network) and rows == columns else None


def _weights(network: Network) -> dict[str, Tensor]:
    named = network.module.network.named_parameters()
    return {key: value.detach() for key, value in named if not key.startswith(_CLASSIFIER)}


def _norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))
