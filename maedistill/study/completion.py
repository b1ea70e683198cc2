"""Check whether a run is complete: finished in its folder, with the same settings, on the same images."""

import json
from functools import cache
from pathlib import Path

from maedistill.config.auto import with_numbers, with_numbers_of
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import changes_text, differing_keys
from maedistill.config.plan import make_plan
from maedistill.config.schema import RunConfig
from maedistill.data.loading.order import label_subset
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.patterns import Split, find_shards
from maedistill.data.shards.scan import USUAL, Members
from maedistill.errors import ConfigError, UserError
from maedistill.report.recorded import readable
from maedistill.runs.checkpoint import latest_step
from maedistill.runs.folder import RunFolder
from maedistill.runs.history import FINISHED, last_end

_find_once = cache(find_shards)  # raises if shards are missing; cached, because many runs read the same shards


def is_done(config: RunConfig) -> bool:
    """Return whether the run of this config is finished in its folder.

    Raises ConfigError if the folder holds a run with other settings or on other images, so that nothing is overwritten;
    ConfigError or DataError if the run is not finished and its shards are missing or too few for one step.
    """
    folder = RunFolder(config.run)
    finished = last_end(folder.path) == FINISHED
    if finished or latest_step(folder.checkpoints) is not None:  # starting anew could overwrite it
        before = folder.load_config()
        same_stage = type(before) is type(config)
        changes = (
            differing_keys(before, with_numbers_of(config, before))
            if same_stage
            else [("stage", before.title, config.title)]
        )
        if changes:
            texts = changes_text(changes, type(config))
            raise ConfigError(
                f"{folder.path} holds a run of other settings ({texts})",
                "restore them, remove that folder with what came from it, or use another --out",
            )
    if finished:
        _require_same_images(folder, config)
    else:
        _require_images(config)
    return finished


def is_scored(scorecard: Path, shards: str, members: Members = USUAL) -> bool:
    """Return whether the JSON file of `evaluate`, in a run folder, is of this run and these shards.

    Raises if the shards are missing.
    """
    _find_once(shards, split="val")
    if not is_of_last_end(scorecard, scorecard.parent):
        return False
    with readable(scorecard):
        scored = json.loads(scorecard.read_text())["fingerprint"]
    return bool(scored == _fingerprint(shards, "val", members=members))


def is_of_last_end(file: Path, run: Path) -> bool:
    """Return whether a file exists and is not older than the end of the run, which may have been continued since."""
    end = run / "exit.json"
    return file.is_file() and not (end.is_file() and end.stat().st_mtime_ns > file.stat().st_mtime_ns)


def _require_same_images(folder: RunFolder, config: RunConfig) -> None:
    metadata = folder.metadata()
    members = Members(config.data.image_key, config.data.label_key)
    used: list[tuple[str, Split, str | None, str | None]] = [("data", "train", config.data.train, config.data.index)]
    if isinstance(config, FinetuneConfig):
        used.append(("validation", "val", config.data.val, None))
    for record, split, shards, index in used:
        if shards is None:
            continue
        if metadata[record]["fingerprint"] != _fingerprint(shards, split, index, members):
            raise ConfigError(
                f"{folder.path} was run on other images than {shards} holds",
                "name the same shards, wherever they are now, or use another --out",
            )


def _require_images(config: RunConfig) -> None:
    """Raise what the run would, with its name, if shards are missing, or too few for one step."""
    try:
        _find_once(config.data.train, split="train")
        if config.data.val:
            _find_once(config.data.val, split="val")
        _require_steps(config)
    except UserError as error:
        raise type(error)(f"the run {config.run}: {error.cause}", error.remedy) from error


def _require_steps(config: RunConfig) -> None:
    """Raise ConfigError if the images of a run, or the share that it has labels of, do not make one step."""
    data, fraction = config.data, 1.0
    if isinstance(config, FinetuneConfig) and config.distill.reads_labels:
        fraction = config.data.label_fraction
    members = Members(data.image_key, data.label_key)
    images = _count(data.train, data.index, members, fraction)
    make_plan(with_numbers(config, images, world_size=1), images, world_size=1)


@cache
def _count(shards: str, index: str | None, members: Members, fraction: float) -> int:
    """Return the number of images in a set of shards of which this fraction of the labels is used."""
    found = open_index(shards, index=index, members=members)
    if fraction == 1:
        return len(found)
    found.require_labels()
    return len(label_subset(found.labels, fraction, seed=0))  # as many with any seed


@cache
def _fingerprint(shards: str, split: Split, index: str | None = None, members: Members = USUAL) -> str:
    """Return the fingerprint of a set of shards. Cached, because many runs read the same shards."""
    return open_index(shards, index=index, split=split, members=members).fingerprint()
