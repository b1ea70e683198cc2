"""Whether a run has been made already: finished in its folder, by the same settings, on the same images."""

import json
from functools import cache
from pathlib import Path

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import differing_keys
from maedistill.config.schema import RunConfig
from maedistill.data.shards.index import open_index
from maedistill.data.shards.patterns import find_shards
from maedistill.errors import ConfigError
from maedistill.runs.checkpoint import latest_step
from maedistill.runs.folder import RunFolder


def is_finished(folder: RunFolder) -> bool:
    """Whether the run in the folder has come to its end, whatever it was."""
    return last_end(folder) == "finished"


def last_end(folder: RunFolder) -> str | None:
    """How the last start in the folder ended, in words; None while it runs, was killed, or never was."""
    file = folder.path / "exit.json"
    return json.loads(file.read_text())["reason"] if file.is_file() else None


def is_done(config: RunConfig) -> bool:
    """Whether the run of this config is finished in its folder.

    Raises ConfigError where the folder holds a run of other settings or on other images: nothing is overwritten; and
    ConfigError or DataError where the run is still to be made and its shards are not there.
    """
    folder = RunFolder(config.run)
    finished = is_finished(folder)
    if finished or latest_step(folder.checkpoints) is not None:  # a start could lose something
        _require_same_settings(folder, config)
    if finished:
        _require_same_images(folder, config)
    else:
        _require_shards(config)
    return finished


def is_scored(scorecard: Path, shards: str) -> bool:
    """Whether the JSON file that tools/evaluate.py writes is there, and tells of these shards, which must be there."""
    _find_once(shards)
    return scorecard.is_file() and json.loads(scorecard.read_text())["fingerprint"] == _fingerprint(shards)


def _require_same_settings(folder: RunFolder, config: RunConfig) -> None:
    before = folder.load_config()
    same_stage = type(before) is type(config)
    changed = differing_keys(before, config) if same_stage else [("stage", before.stage, config.stage)]
    if changed:
        shown = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, old, new in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ConfigError(
            f"{folder.path} holds a run of other settings ({shown}{more})",
            "restore them, remove that folder with what came from it, or use another --out",
        )


def _require_same_images(folder: RunFolder, config: RunConfig) -> None:
    facts = folder.facts()
    used = [(facts["data"], config.data.train, config.data.index)]
    if isinstance(config, FinetuneConfig):
        used.append((facts["validation"], config.data.val, None))
    for known, shards, index in used:
        if known["fingerprint"] != _fingerprint(shards, index):
            raise ConfigError(
                f"{folder.path} was run on other images than {shards} holds",
                "name the same shards, wherever they are now, or use another --out",
            )


def _require_shards(config: RunConfig) -> None:
    for shards in filter(None, (config.data.train, config.data.val)):
        _find_once(shards)


@cache
def _find_once(shards: str) -> None:
    """Raises where shards are missing; asked once, however many runs read them."""
    find_shards(shards)


@cache
def _fingerprint(shards: str, index: str | None = None) -> str:
    """What a set of shards is known by; opened once, however many runs are asked about."""
    return open_index(shards, index=index).fingerprint()
