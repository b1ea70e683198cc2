"""What a run folder records of its run, and whether a start may continue it.

Each checkpoint has a copy of config.yaml and run.json, and its manifest verifies them. If the run's own are gone
or damaged, by a power cut or by a user, the newest copy is read. So a whole checkpoint can always be continued.

    read_config, read_metadata    for any reader
    read_previous, require_same   for a start, which uses its own settings if no copy is left
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import changes_text, differing_keys
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.schema import RunConfig
from maedistill.config.values import STAGES
from maedistill.errors import ConfigError, DataError
from maedistill.runs.checkpoint import whole_copy
from maedistill.runs.history import method_call
from maedistill.runs.provenance import version_of

CONFIG, METADATA, CHECKPOINTS = "config.yaml", "run.json", "checkpoints"


@dataclass(frozen=True)
class Previous:
    """The run that a start continues. config: None if it is lost; metadata: empty then. lost: a line for each file."""

    config: RunConfig | None
    metadata: dict[str, Any]
    lost: tuple[str, ...]


def read_metadata(run: Path) -> dict[str, Any]:
    """Read run.json; empty before the first start. Raises DataError if it is damaged."""
    file, _ = _find(run, METADATA)
    if file is None:
        return {}
    try:
        return _json_object(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file} cannot be read ({str(error)[:200]})", "restore it from a copy, or use another run folder"
        ) from error


def known_metadata(run: Path) -> dict[str, Any]:
    """Read run.json for a start, which can do without it: empty if it is damaged, too."""
    try:
        return read_metadata(run)
    except DataError:  # `Previous.lost` says so
        return {}


def read_config(run: Path, root: type[Any] | None = None) -> PretrainConfig | FinetuneConfig:
    """Read config.yaml. root: its schema, if not that of the stage in run.json.

    Raises ConfigError if it is gone or wrong, or if the run is of another version.
    """
    if root is None:
        stage = read_metadata(run).get("stage")
        if stage not in STAGES:
            raise _refusal(run, f"was written by another version (its run.json says stage {stage!r})")
        root = STAGES[stage]
    file, _ = _find(run, CONFIG)
    if file is None:
        raise ConfigError(
            f"run: {run / CONFIG} is gone, so the settings of the run are unknown",
            "restore it from a copy, or use another run=",
        )
    try:
        config: PretrainConfig | FinetuneConfig = load_config(file, root=root, to_run=False).config
    except ConfigError as error:
        if not (starts := known_metadata(run).get("starts")):
            raise
        raise ConfigError(
            f"settings of a run: {error.cause}",
            f"if they were not edited, use the maedistill that wrote them, {version_of(starts[-1])}",
        ) from error
    return config


def read_previous(run: Path, now: RunConfig) -> Previous:
    """Read both files for a start whose settings are `now`."""
    found, metadata = {name: _find(run, name) for name in (METADATA, CONFIG)}, known_metadata(run)
    known = found[CONFIG][0] is not None
    config = read_config(run, None if metadata else type(now)) if known else None
    return Previous(config, metadata, tuple(line for _, line in found.values() if line))


def require_same(run: Path, previous: Previous, config: RunConfig, metadata: dict[str, Any], *, extend: bool) -> None:
    """Raise ConfigError unless settings, normalisation, data and teachers are those of the run, as far as known."""
    if previous.config is not None:
        _require_same_settings(run, previous.config, config, extend=extend)
    recorded = previous.metadata
    for name in ("mean", "std"):
        old, new = (list(one.get("input", {}).get(name, ())) for one in (recorded, metadata))
        if old and old != new:
            remedy = f"set data.{name} to what it was, or use another run="
            raise _refusal(run, f"reads images with {name} {old}, now {new}", remedy)
    if any(recorded.get(name) not in (None, metadata.get(name)) for name in ("method_class", "method_arguments")):
        raise _refusal(
            run,
            f"was trained by {method_call(recorded)}, now by {method_call(metadata)}",
            "give the method that the run was started with, and its arguments, or use another run=",
        )
    data, new_data = recorded.get("data"), metadata["data"]
    if data is not None and data != new_data:
        raise _refusal(
            run,
            f"was trained on other data ({data['images']} images, {data['fingerprint'][:12]}; "
            f"now {new_data['images']}, {new_data['fingerprint'][:12]})",
            "name the same shards, wherever they are now, or use another run=",
        )
    if recorded.get("teacher_weights") not in (None, metadata["teacher_weights"]):
        raise _refusal(
            run,
            f"has learned from a teacher with other weights than now: {metadata['teacher']}",
            "restore the weights that the teacher had (it may have been trained further), or use another run=",
        )


def _require_same_settings(run: Path, before: RunConfig, config: RunConfig, *, extend: bool) -> None:
    if type(before) is not type(config):
        raise _refusal(run, f"holds a run of {before.title}, not of {config.title}")
    changed = differing_keys(before, config)
    if extend:
        changed = [change for change in changed if change[0] != "optim.epochs"]
        if config.optim.epochs < before.optim.epochs:
            raise ConfigError(
                f"optim.epochs: {config.optim.epochs:g} is less than the {before.optim.epochs:g} of {run}",
                "--extend only adds epochs; use another run= for fewer",
            )
    if changed:
        changes = changes_text(changed, type(config))
        only_epochs = [key for key, _, _ in changed] == ["optim.epochs"]
        remedy = "add --extend to continue to the new number" if only_epochs else "restore them, or use another run="
        raise _refusal(run, f"belongs to other settings ({changes})", remedy)


def _find(run: Path, name: str) -> tuple[Path | None, str]:
    """Return the file to read, or None; and what is wrong with the run's own file, empty if nothing."""
    own, copy = run / name, whole_copy(run / CHECKPOINTS, name)
    try:
        text = own.read_text()
    except UnicodeDecodeError:
        problem = "is damaged"
    except OSError:
        problem = "cannot be read" if os.path.exists(own) else "is gone"
    else:
        problem = "is empty" if not text.strip("\0\n ") else "" if _is_whole(name, text, copy) else "is damaged"
    if not problem:
        return own, ""
    if copy is not None:
        return copy, f"{own} {problem}: its copy in {copy.parent.name} counts"
    known = None if problem in ("is gone", "is empty") else own
    return known, f"{own} {problem}, and no checkpoint has a copy: this start uses the settings that it was given"


def _is_whole(name: str, text: str, copy: Path | None) -> bool:
    """Return whether no part of a file is missing. config.yaml has the keys of its copy, each on one line."""
    if name == METADATA:
        try:
            return bool(_json_object(text))
        except (ValueError, RecursionError):
            return False
    keys, others = (
        [line.partition(":")[0] for line in lines.splitlines()] for lines in (text, copy.read_text() if copy else text)
    )
    return keys == others and text.endswith("\n")


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _refusal(run: Path, problem: str, remedy: str = "use another run=") -> ConfigError:
    return ConfigError(f"run: {run} {problem}", remedy)
