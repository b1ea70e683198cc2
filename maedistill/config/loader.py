"""Merges a YAML file, the files it extends and `key=value` overrides into one frozen config that knows its origins.

    extends: base.yaml            # or a list; relative to this file; later files win, this file wins over them
    optim: {epochs: 300}          # overridden by `optim.epochs=400` on the command line, where the last one wins

All settings are first merged as a flat dict from dotted names to values and their origins, then checked together: each
value by itself (`values.py`), then the rules between them (`shared_rules.py` and each stage's own rules).
Relative paths among the values are relative to the working directory.
"""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from maedistill.config import finetune_rules, pretrain_rules
from maedistill.config.document import Refusal, read_document, read_text
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import all_keys
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.problem import Problem, config_error
from maedistill.config.schema import RunConfig
from maedistill.config.values import Root, validated
from maedistill.errors import ConfigError

MOST_FILES = 32  # limit for one config; a file that is extended several times counts each time

_LONGEST_PLACE = 200  # characters of an override that an error message quotes


@dataclass(frozen=True)
class LoadedConfig(Generic[Root]):
    """A valid config, and the origin of each dotted key: "default", "FILE:LINE" or "command line"."""

    config: Root
    origins: dict[str, str]


@dataclass(frozen=True)
class _Setting:
    """A value, its origin, and its place as an error message names it: "run.yaml:12 optim.lr"."""

    value: Any
    origin: str
    place: str


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, root: type[Root] = PretrainConfig, to_run: bool = True
) -> LoadedConfig[Root]:
    """Read a config file, apply `key=value` overrides (values in YAML) and check everything.

    root: the schema, PretrainConfig or FinetuneConfig.
    to_run: whether shards and run folder must be named, as for a run; a recipe can be inspected without them.
    Raises `ConfigError`, which names the first problem with its place and counts the others.
    """
    settings = _read_file(Path(path), extended_by=(), read=[])
    for override in overrides:
        settings |= _read_override(override)
    config = validated({name: setting.value for name, setting in settings.items()}, root=root)
    problems = config if isinstance(config, list) else _broken_rules(config, to_run=to_run)
    if problems:
        raise config_error(problems, {name: setting.place for name, setting in settings.items()})
    origins = {name: settings[name].origin if name in settings else "default" for name in all_keys(root=root)}
    return LoadedConfig(config, origins)


def _read_file(path: Path, *, extended_by: tuple[Path, ...], read: list[Path]) -> dict[str, _Setting]:
    """Return the settings of a file, merged over those of the files that it extends.

    extended_by: the chain of files that led to this one. read: all files so far; this one is added.
    """
    read.append(path)
    if len(read) > MOST_FILES:
        raise ConfigError(f"{path}: {read[0]} extends more than {MOST_FILES} files", "extend fewer of them")
    try:
        leaves = read_document(_read_text(path))
    except Refusal as error:
        raise ConfigError(f"{path}:{error.line}: {error.cause}", error.remedy) from None
    whole, _ = leaves.pop("", (None, 1))  # the whole content, if it is not a non-empty mapping
    if whole not in (None, {}):
        raise ConfigError(f"{path}: a config file is a mapping of `key: value`, not a list or text", "see configs/")
    bases, line = leaves.pop("extends", ([], 0))
    settings: dict[str, _Setting] = {}
    for base in _extended_files(bases, path, line):
        chain = (*extended_by, path)
        if any(_same_file(base, other) for other in chain):
            shown = " -> ".join(map(str, (*chain, base)))
            raise ConfigError(
                f"{path}:{line} extends: the files extend each other: {shown}", "remove one of these `extends`"
            )
        if not os.path.isfile(base):  # not base.is_file(), which raises for a name that is too long
            raise ConfigError(f"{path}:{line} extends: there is no file {base}", _nearest_files(base))
        settings |= _read_file(base, extended_by=chain, read=read)
    own = {n: _Setting(value, f"{path}:{at}", f"{path}:{at} {n}") for n, (value, at) in leaves.items()}
    return settings | own


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}", _nearest_files(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}", "name a YAML file in UTF-8, e.g. one of configs/"
        ) from None


def _extended_files(bases: Any, path: Path, line: int) -> list[Path]:
    """Return the files that an `extends` value names, relative to the file that contains it."""
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"{path}:{line} extends: expected a file name or a list of them", "write `extends: base.yaml`"
        )
    return [Path(os.path.normpath(path.parent / name)) for name in names]


def _same_file(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _nearest_files(path: Path) -> str:
    """Return a remedy for a missing file: YAML files of similar names around the nearest existing folder."""
    folder = next((parent for parent in path.parents if os.path.isdir(parent)), Path())
    there = sorted(str(found) for pattern in ("*.yaml", "*/*.yaml") for found in folder.glob(pattern))
    near = difflib.get_close_matches(str(path), there, n=3, cutoff=0.6) or there[:3]
    return f"did you mean {' or '.join(near)}?" if near else f"{folder} holds no .yaml files; name one that exists"


def _read_override(text: str) -> dict[str, _Setting]:
    """Return the settings of one `key=value`; several if the value is a mapping."""
    place = f"command line {' '.join(text.split())}"
    place = place if len(place) <= _LONGEST_PLACE else place[:_LONGEST_PLACE] + "..."
    name, equals, value = text.partition("=")
    if not equals or name.split() != [name] or name.startswith("-"):
        raise ConfigError(f"{place}: not of the form key=value", "overrides look like optim.epochs=300, without dashes")
    try:
        leaves = read_document(value, prefix=name)
    except Refusal as error:
        remedy = f"{error.remedy}; on a command line '\"...\"' is text as it stands"
        raise ConfigError(f"{place}: {error.cause}", remedy) from None
    return {leaf: _Setting(value, "command line", place) for leaf, (value, _) in leaves.items()}


def _broken_rules(config: RunConfig, *, to_run: bool) -> list[Problem]:
    """Return all problems between the keys of a config; empty for a usable config."""
    stage = {PretrainConfig: pretrain_rules, FinetuneConfig: finetune_rules}[type(config)]
    rules = (*stage.TO_RUN, *stage.RULES) if to_run else stage.RULES
    return [problem for rule in rules for problem in rule(config)]
