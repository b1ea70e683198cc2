"""Quantify what networks know about images during training, and write the results.

    RUN, ... -> states -> (state, batch of images) -> OUT/entropies/NN-STEP-BATCH.safetensors, by any process
    all of these -> OUT/knowledge.json, then knowledge.md and pictures, by rank 0

A batch holds the same images whatever the number of processes, so on a CPU each file has the same bytes. (Kernels round
by the number of threads: the command takes one.) A process takes the next file that nobody has taken, so none waits for
long. What is on disk is not computed again.
"""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from maedistill.analysis.concepts import COURSE_METRICS, MARGIN, Array, metrics, reasons_to_leave_out, summarize
from maedistill.analysis.entropies import EntropySpec, cell_entropies
from maedistill.analysis.pages import write_pages
from maedistill.analysis.pictures import Pictures, check_foreground, read_foreground, read_pictures
from maedistill.analysis.seeds import over_seeds
from maedistill.analysis.states import Inspection, Opener, State, find_states, inspect_states, open_state
from maedistill.data.images.transforms import normalize, to_float01
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.patterns import describe_shards
from maedistill.durable import make_folder, write_durably
from maedistill.errors import ConfigError, DataError, NumericsError, join_first
from maedistill.escaping import warn
from maedistill.evaluation.context import EvalContext, print_data, print_main, print_network
from maedistill.processes import distributed
from maedistill.runs.history import duration
from maedistill.runs.lock import FolderLock
from maedistill.runs.records import write_errors, write_text
from maedistill.weights.backbone import Pool
from maedistill.weights.network import Network

SETTINGS, RESULT, ENTROPIES = "settings.json", "knowledge.json", "entropies"


@dataclass(frozen=True)
class KnowledgeSpec:
    """Which networks and images. count: of images. foreground: `center`, `none` or a folder of masks.

    grid: cells along a side; None for the networks' patches. block: whose output is the feature. pool: the mean of
    its patches, or its class token. crop, exif: other than the first network's.
    """

    networks: Sequence[str]
    images: str
    out: Path
    count: int = 50
    foreground: str = "center"
    grid: int | None = None
    block: int = -1
    pool: Pool = "mean"
    image_size: int | None = None
    crop: float | None = None
    exif: str | None = None
    noise: EntropySpec = field(default_factory=EntropySpec)


@dataclass(frozen=True)
class _Unit:
    """What one process computes at a time: the entropies of a batch of images at one state."""

    file: Path
    state: State
    rows: slice


def quantify(spec: KnowledgeSpec, context: EvalContext) -> dict[str, Any]:
    """Compute the entropies that are not on disk yet, write all results, and return the content of knowledge.json.

    Everything that the user may have to correct is checked first. Collective. Raises subclasses of UserError.
    """
    distributed.on_main(lambda: check_foreground(spec.foreground, spec.grid))  # before checkpoints are read for long
    states = distributed.on_main(lambda: find_states(spec.networks))
    opener = partial(open_state, block=spec.block, image_size=spec.image_size, pool=spec.pool)
    inspected = distributed.on_main(lambda: inspect_states(states, opener, grid=spec.grid))
    first = opener(states[0])
    first = replace(first, crop=spec.crop or first.crop)  # whose view of the images all networks share
    apply_exif = (spec.exif or first.exif) == "apply"
    index = distributed.main_first(lambda: open_index(spec.images, split="val", apply_exif=apply_exif))
    pictures = read_pictures(index, first, context, count=spec.count, seed=spec.noise.seed)
    foreground = distributed.on_main(lambda: read_foreground(spec.foreground, pictures, first, grid=inspected.grid))
    print_network("first", first)
    print_data("data", index, describe_shards(spec.images, index.shards))
    settings = _settings(spec, context, first, pictures, inspected)
    units = _units(spec, states, len(pictures.ids), batch=context.batch)
    missing = distributed.on_main(lambda: _keep(spec.out, settings, units))
    if not all(distributed.gather_objects((spec.out / SETTINGS).is_file())):
        raise DataError(f"{spec.out} is not the same folder on all machines", "name a shared one: --out")
    cells, number = f"{inspected.grid} x {inspected.grid} cells", len(inspected.distances)
    print_main("states", f"{len(states)}, of {number} networks; {len(pictures.ids):,} images of {cells}")
    print_main("files", f"{len(units):,}, {len(units) - len(missing):,} of them are there already")
    _compute(spec, context, [units[i] for i in missing], pictures, opener, grid=inspected.grid)
    distributed.barrier()  # for at most the time of one file
    result = distributed.on_main(lambda: _collect(spec, settings, units, pictures, foreground, inspected))
    distributed.barrier()  # a launcher ends the others when one rank exits
    return result


def _settings(
    spec: KnowledgeSpec, context: EvalContext, first: Network, pictures: Pictures, inspected: Inspection
) -> dict[str, Any]:
    """Return everything that the entropies depend on, as JSON has it."""
    names = ("size", "crop", "interpolation", "crop_mode", "border")
    settings: dict[str, Any] = {"format": 1, "torch": torch.__version__, "timm": timm.__version__}
    settings |= {name: getattr(first, name) for name in names} | {"states": inspected.details, "grid": inspected.grid}
    settings |= {"apply_exif": pictures.index.apply_exif, "images": pictures.index.fingerprint()}
    settings |= {"ids": pictures.ids.tolist(), "block": spec.block, "pool": spec.pool, **asdict(spec.noise)}
    settings |= {"batch": context.batch, "device": context.device_name}
    return json.loads(json.dumps(settings))


def _units(spec: KnowledgeSpec, states: Sequence[State], count: int, *, batch: int) -> list[_Unit]:
    numbers = {name: i for i, name in enumerate(dict.fromkeys(state.name for state in states))}
    units = []
    for state in states:
        for i, start in enumerate(range(0, count, batch)):
            name = f"{numbers[state.name]:02d}-{state.step:09d}-{i:04d}.safetensors"
            units.append(_Unit(spec.out / ENTROPIES / name, state, slice(start, min(start + batch, count))))
    return units


def _keep(out: Path, settings: dict[str, Any], units: Sequence[_Unit]) -> list[int]:
    """Lock the folder, make it or check that it is of these settings; return the numbers of the units that it lacks."""
    file = out / SETTINGS
    with write_errors(out):
        make_folder(out)
        others = sorted(path.name for path in out.iterdir() if path.name[0] != "." and path.name != "lock")
        kept = any((out / ENTROPIES).glob("*.safetensors"))
        if others and not (file.is_file() if kept else _is_ours(file)):
            raise ConfigError(f"{out} holds something else ({join_first(others, 3)})", "name a new folder: --out")
        FolderLock(out, "--out")  # until this process ends
        if kept:
            try:
                old = dict(json.loads(file.read_bytes()))
            except (OSError, TypeError, ValueError) as error:
                raise DataError(f"{file} is damaged ({error})", "name a new folder: --out") from error
            if differing := sorted(name for name in old.keys() | settings if old.get(name) != settings.get(name)):
                raise ConfigError(
                    f"{out} holds entropies of another {join_first(differing, 4)}",
                    f"give what is in its {SETTINGS}, or name a new folder: --out",
                )
        else:
            write_text(file, json.dumps(settings, indent=1) + "\n")
        make_folder(out / ENTROPIES)
        for stray in (out / ENTROPIES).glob(".*.tmp"):  # of a killed process, see durable.py
            stray.unlink()
    return [i for i, unit in enumerate(units) if _read(unit, grid=settings["grid"]) is None]


def _is_ours(file: Path) -> bool:
    """Return whether a settings.json is that of entropies: an editor may have one, too."""
    with suppress(OSError, TypeError, ValueError):
        return {"format", "states", "grid"} <= dict(json.loads(file.read_bytes())).keys()
    return False


def _compute(
    spec: KnowledgeSpec, context: EvalContext, units: Sequence[_Unit], pictures: Pictures, opener: Opener, *, grid: int
) -> None:
    """Compute and write units until none is left that no process has taken. Only the counter is shared."""
    next_number, began, opened = distributed.shared_counter(), time.monotonic(), None
    while (number := next_number()) < len(units):
        unit = units[number]
        if opened is None or opened[0] != unit.state:
            network = opener(unit.state)
            mean, std = (torch.tensor(x, device=context.device).view(3, 1, 1) for x in (network.mean, network.std))
            opened = unit.state, partial(_features, network.module.to(context.device).eval(), mean, std)
        pixels, ids = (x[unit.rows].to(context.device) for x in (pictures.pixels, pictures.ids))
        entropies, change = cell_entropies(opened[1], to_float01(pixels), ids, grid=grid, spec=spec.noise)
        found = {"entropies": entropies.cpu(), "change": change.cpu()}
        if not all(tensor.isfinite().all() for tensor in found.values()):
            raise NumericsError(
                f"the features of {unit.state.name} at step {unit.state.step} are not finite under noise",
                "leave this network out, or use checkpoints from before its training broke",
            )
        with write_errors(unit.file):
            write_durably(unit.file, save(found))
        seconds = time.monotonic() - began
        left = duration(seconds / (number + 1) * (len(units) - number - 1))
        print_main("progress", f"{number + 1:,} of {len(units):,} in {duration(seconds)}, about {left} left")


def _features(module: nn.Module, mean: Tensor, std: Tensor, pixels: Tensor) -> Tensor:
    return module(normalize(pixels, mean, std))


def _read(unit: _Unit, *, grid: int) -> dict[str, Tensor] | None:
    """Return the content of a unit's file; None if it is not there, or damaged, which is said."""
    if not unit.file.is_file():
        return None
    images = unit.rows.stop - unit.rows.start
    try:
        found = load(unit.file.read_bytes())
        shapes = {name: tuple(x.shape) for name, x in found.items() if x.dtype == torch.float32 and x.isfinite().all()}
        if shapes == {"entropies": (images, grid * grid), "change": (images,)}:
            return found
    except (OSError, SafetensorError):
        pass
    warn(f"{unit.file} is damaged, and is computed again")
    return None


def _collect(
    spec: KnowledgeSpec, settings: dict[str, Any], units: Sequence[_Unit], pictures: Pictures,
    foreground: Array | None, inspected: Inspection,
) -> dict[str, Any]:  # fmt: skip
    """Write knowledge.json from the files of all units, then the page and the pictures; return its content."""
    rows: dict[str, dict[int, list[dict[str, Tensor]]]] = {}  # of each network and step
    for unit in units:
        found = _read(unit, grid=inspected.grid)
        if found is None:
            raise DataError(f"{unit.file} is missing", "start the same command again: it writes only missing files")
        rows.setdefault(unit.state.name, {}).setdefault(unit.state.step, []).append(found)
    entropies, changes = (
        {name: np.stack([np.concatenate([part[kind].double() for part in parts]) for parts in steps.values()])
         for name, steps in rows.items()}
        for kind in ("entropies", "change")
    )  # fmt: skip
    reasons = reasons_to_leave_out([*entropies.values()], [*changes.values()], foreground)
    counts = ~np.any([*reasons.values()], axis=0)  # [I], of all networks together
    inside = None if foreground is None else foreground[counts]
    networks, values, maps = {}, {}, {}
    for name, steps in rows.items() if counts.any() else ():
        networks[name], values[name], maps[name] = summarize(
            entropies[name][:, counts], inside, steps=[*steps], distances=inspected.distances[name]
        )
    base, *others = values or [""]
    differences = {}
    for name in others:
        compared = metrics(values[name], values[base])
        if rows[name].keys() != rows[base].keys():
            compared = {kind: one for kind, one in compared.items() if kind not in COURSE_METRICS}
        differences[name] = {"to": base, "metrics": compared}
    result = {
        "settings": settings,
        "foreground": spec.foreground,
        "margin": MARGIN,
        "chosen": pictures.names,
        "counted": list(compress(pictures.names, counts)),
        "left_out": {reason: int(images.sum()) for reason, images in reasons.items()},
        "networks": networks,
        "differences": differences,
        "seeds": over_seeds(networks),
    }
    result = json.loads(json.dumps(result), parse_constant=lambda _: None)  # what is not a number is null
    write_text(spec.out / RESULT, json.dumps(result, indent=1) + "\n")  # before anything that may fail
    if not values:
        warn("no image counts for all networks, so there are no metrics; --foreground none needs no background")
    write_pages(result, spec.out, pixels=pictures.pixels[torch.from_numpy(counts)], maps=maps, foreground=inside)
    print_main("result", f"{counts.sum()} of {len(counts)} images count; {spec.out / 'knowledge.md'}")
    return result
