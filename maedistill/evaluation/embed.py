"""Features on disk, in files of equal ranges of ids: the same bytes for any number of processes, killed or not.

    Network, ShardIndex -> fixed batches, divided among the ranks -> rows in order -> OUT/features-000000.safetensors
    OUT/manifest.json: how they were computed, and of each finished file its size and SHA-256

A batch holds the same images whatever the number of processes, and each file begins with a new one: an image has the
same place in its batch each time, so that kernels round alike. (They also round by the number of threads: the command
takes one.) A file is on disk before the manifest names it. What the manifest names and is intact is not computed again.

n images   b batch   m images of a file   D width   h, w a map's sides
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from maedistill.data.loading.evaluation import PADDING, EvaluationImages, exact_batches, undecodable
from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.patterns import describe_shards
from maedistill.data.shards.scan import NO_LABEL, USUAL, Members
from maedistill.durable import make_folder, write_durably
from maedistill.errors import ConfigError, DataError, join_first
from maedistill.escaping import warn
from maedistill.evaluation.context import EvalContext, finish, metadata, print_data, print_main, print_network
from maedistill.evaluation.features import require_finite_rows
from maedistill.evaluation.full_pass import Predictor, evaluation_mode, report_bad
from maedistill.processes import distributed
from maedistill.runs.manifest import MANIFEST
from maedistill.runs.records import write_errors, write_text
from maedistill.weights.backbone import Backbone, DenseBackbone, Pool, open_backbone, open_dense
from maedistill.weights.network import Network
from maedistill.weights.state_dict import weights_fingerprint

Entry = dict[str, Any]  # of a file in the manifest: images, bad_ids, bytes, sha256
_POOLED, _PATCHES = 10_000, 500  # images per file: 31 and 300 MB at D = 768, with 196 patches
# What a killed process leaves, see durable.py.
_LEFTOVER = re.compile(rf"\.(features-\d+\.safetensors|{re.escape(MANIFEST)})\.\d+\.tmp")


@dataclass(frozen=True)
class EmbedSpec:
    """Which features to write, of which shards. per_file: images per file. crop: overrides the network's own."""

    model: str
    shards: str
    out: Path
    patches: bool = False
    per_file: int | None = None
    index: str | None = None
    weights: str = "model"
    block: int | None = None
    pool: Pool = "mean"
    image_size: int | None = None
    members: Members = USUAL
    exif: str | None = None
    crop: float | None = None


def embed(spec: EmbedSpec, context: EvalContext) -> dict[str, Any]:
    """Write the features of all images that are not on disk yet, and return the content of the manifest. Collective.

    Images that cannot be decoded are in no file; the manifest has their ids. Raises subclasses of UserError.
    """
    network = distributed.main_first(partial(_open, spec))
    apply_exif = (spec.exif or network.exif) == "apply"
    open_images = partial(open_index, split="val", members=spec.members, apply_exif=apply_exif)
    index = distributed.main_first(lambda: open_images(spec.shards, index=spec.index))
    assert isinstance(network.module, Backbone | DenseBackbone)
    print_network("model", network)
    print_data("data", index, describe_shards(spec.shards, index.shards))
    print_main("features", network.module.describe())
    per_file = spec.per_file or (_PATCHES if spec.patches else _POOLED)
    starts = {f"features-{i:06d}.safetensors": first for i, first in enumerate(range(0, len(index), per_file))}
    settings = metadata(network, context) | {"weights_sha256": weights_fingerprint(network.module)}
    settings |= {"features": network.module.describe(), "images": len(index), "fingerprint": index.fingerprint()}
    settings |= {"apply_exif": apply_exif, "images_per_file": per_file, "files": len(starts)}
    stored = {"format": 1, "settings": json.loads(json.dumps(settings))}
    entries = distributed.on_main(lambda: _keep(spec.out, stored, list(starts)))
    missing = [name for name in starts if name not in entries]
    print_main("files", f"{len(starts):,} of {per_file:,} images, {len(entries):,} of them are there already")
    images = EvaluationImages(index, torch.arange(len(index)), network.transform())
    predictor = Predictor(network.module, context, mean=network.mean, std=network.std)
    ranges = [range(starts[name], min(starts[name] + per_file, len(index))) for name in missing]
    context = replace(context, batch=min(context.batch, per_file, len(index)))  # whatever is missing
    with evaluation_mode(network.module):
        for name, (ids, rows) in zip(missing, _compute(predictor, images, ranges, context), strict=True):
            require_finite_rows(rows[ids >= 0])
            entries[name] = distributed.on_main(partial(_write, spec.out / name, index, ids, rows))
            entries = {name: entries[name] for name in starts if name in entries}
            distributed.on_main(partial(_write_manifest, spec.out, stored, entries))
    if bad := [sample for entry in entries.values() for sample in entry["bad_ids"]]:
        report_bad(images, torch.tensor(bad), context)
    count = sum(entry["images"] for entry in entries.values())
    print_main("result", f"features of {count:,} images in {spec.out}, {len(missing):,} files written")
    return finish(stored | {"files": entries}, None)


@torch.no_grad()
def _compute(
    predictor: Predictor, images: EvaluationImages, ranges: Sequence[range], context: EvalContext
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids int64 [m] and features [m, ...] of each range of samples, on the CPU of every rank. Collective.

    Ids of padding and of images that cannot be decoded are negative, as those of `exact_batches`.
    """
    if not ranges:
        return
    batch = context.batch
    parts = [F.pad(torch.tensor(part), (0, -len(part) % batch), value=PADDING).view(-1, batch) for part in ranges]
    batches, world_size = torch.cat(parts), distributed.world_size()
    batches = F.pad(batches, (0, 0, 0, -len(batches) % world_size), value=PADDING)  # equally many for each rank
    mine = images.with_samples(batches[distributed.rank() :: world_size].flatten())
    todo = [len(part) for part in parts]
    found: list[tuple[Tensor, Tensor]] = []
    loaded = exact_batches(
        mine, batch=batch, workers=context.workers, device=context.device, timeout_seconds=context.timeout_seconds
    )
    for pixels, _, ids in loaded:
        gathered = [distributed.all_gather_rows(rows).cpu().split(batch) for rows in (ids, predictor(pixels))]
        for one in zip(*gathered, strict=True):  # a batch of each rank, in their order
            found.append(one)
            if todo and len(found) == todo[0]:
                yield torch.cat([ids for ids, _ in found]), torch.cat([rows for _, rows in found])
                del todo[0], found[:]


def _open(spec: EmbedSpec) -> Network:
    if spec.patches:
        blocks = None if spec.block is None else [spec.block]
        network = open_dense(spec.model, weights=spec.weights, image_size=spec.image_size, blocks=blocks)
    else:
        network = open_backbone(
            spec.model, weights=spec.weights, image_size=spec.image_size, block=spec.block, pool=spec.pool
        )
    return replace(network, crop=spec.crop or network.crop)


def _write(file: Path, index: ShardIndex, ids: Tensor, rows: Tensor) -> Entry:
    """Write the rows whose ids are samples, with their labels if any sample has one; return the file's entry."""
    seen = ids >= 0
    tensors = {"ids": ids[seen], "features": rows[seen]}
    if (index.labels != NO_LABEL).any():
        tensors["labels"] = torch.from_numpy(index.labels[tensors["ids"].numpy()])
    data, bad = save(tensors), undecodable(ids[ids < PADDING])
    with write_errors(file):
        write_durably(file, data)
    print_main("file", f"{file.name}: {len(tensors['ids']):,} images")
    entry = {"images": len(tensors["ids"]), "bad_ids": bad.tolist()}
    return entry | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_manifest(out: Path, content: dict[str, Any], entries: dict[str, Entry]) -> None:
    write_text(out / MANIFEST, json.dumps(content | {"files": entries}, indent=1) + "\n")


def _keep(out: Path, content: dict[str, Any], names: Sequence[str]) -> dict[str, Entry]:
    """Make the folder, or return the entries of its intact files. Raises ConfigError for one with other content."""
    with write_errors(out):
        make_folder(out)
        names_there = {path.name for path in out.iterdir()}
    leftovers = {name for name in names_there if _LEFTOVER.fullmatch(name)}
    others = sorted(names_there - leftovers)
    if not others:
        _write_manifest(out, content, {})
    found = None if others and MANIFEST not in others else _read_manifest(out / MANIFEST)
    if found is None:
        raise ConfigError(f"{out} holds other files than features ({join_first(others, 3)})", "name a new folder")
    old, files = found
    new = content["settings"]
    names_of_settings = (old.keys() | new) - {"model"}  # a path has many spellings, and weights have one fingerprint
    if differing := sorted(name for name in names_of_settings if old.get(name) != new.get(name)):
        raise ConfigError(
            f"{out} holds features that were computed with another {join_first(differing, 3)}",
            "give the settings that are in its manifest.json, or name a new folder",
        )
    for name in leftovers:  # only now is it known whose they are
        with suppress(OSError):  # they harm nothing
            (out / name).unlink()
    intact = {name: files[name] for name in names if name in files and _is_intact(out / name, files[name])}
    for name in files.keys() - intact:
        warn(f"{out / name} is not what the manifest says, and is computed again")
    return intact


def _read_manifest(file: Path) -> tuple[dict[str, Any], dict[str, Entry]] | None:
    """Return the settings and the entries of the files; None for a manifest of something else, as of a checkpoint.

    Raises DataError for a damaged one.
    """
    try:
        stored = json.loads(file.read_bytes())
        if isinstance(stored, dict) and "settings" not in stored:
            return None
        files = {
            name: {
                "images": int(entry["images"]),
                "bad_ids": [int(sample) for sample in entry["bad_ids"]],
                "bytes": int(entry["bytes"]),
                "sha256": str(entry["sha256"]),
            }
            for name, entry in stored["files"].items()
        }
        return dict(stored["settings"]), files
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{file} is damaged ({type(error).__name__}: {error})",
            "name a new folder; or remove this one, if it holds features only",
        ) from error


def _is_intact(file: Path, entry: Entry) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == entry["sha256"]
