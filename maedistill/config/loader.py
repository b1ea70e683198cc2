"""Merges a YAML file, the files it extends and `key=value` overrides into one frozen config that knows its origins.

    extends: base.yaml            # or a list; relative to this file, or names such as own/dmae; later files win, this
                                  # file wins over them
    optim: {epochs: 300}          # overridden by `optim.epochs=400` on the command line, where the last one wins

What wins over a key wins over what excludes it, too: `optim.lr=1e-3` on the command line drops a file's `base_lr`. Two
keys that exclude each other are refused only if both stand at one level.

All settings are first merged as a flat dict from dotted names to values and their origins, then checked together: each
value by itself (`values.py`), then the rules between them (`shared_rules.py` and each stage's own rules).
Relative paths among the values are relative to the working directory.
"""

import difflib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

from maedistill.config import finetune_rules, pretrain_rules
from maedistill.config.document import CONFIGS, UNPRINTABLE, Refusal, config_name, find_config, read_document, read_file
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import all_keys
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.schema import RunConfig
from maedistill.config.shared_rules import Problem
from maedistill.config.sources import named_source
from maedistill.config.values import Root, validated
from maedistill.errors import ConfigError, join_first, require_no_secret
from maedistill.escaping import masked

COMMAND_LINE, PYTHON = "command line", "Python"  # origins of settings
MOST_FILES = 32  # limit for one config; a file that is extended several times counts each time

_TOP = 1  # level of the command line; a CONFIG is 0, what it extends -1, and so on
_SOURCES = ("init.source", "teacher.source")
_LONGEST_PLACE = 200  # characters of an override that an error message quotes


@dataclass(frozen=True)
class LoadedConfig(Generic[Root]):
    """A valid config, the origin of each dotted key ("default", "FILE:LINE" or "command line"), and notes."""

    config: Root
    origins: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Setting:
    """A value, its origin, its place as an error message names it ("run.yaml:12 optim.lr"), and its level."""

    value: Any
    origin: str
    place: str
    level: int


_NOTHING = _Setting(None, "", "", 0)


def load_config(
    path: str | Path | RunConfig | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    root: type[Root],
    to_run: bool = True,
    given: Mapping[str, Any] | None = None,
    unused: Sequence[str] = (),
) -> LoadedConfig[Root]:
    """Read a config file, apply `key=value` overrides (values in YAML) and check everything.

    path: a file, or the name of a config that comes with maedistill, such as imagenet/dmae_vit_b; or from Python a
    config or a mapping of settings, as the overrides may be. given: settings above the overrides, from Python. unused:
    keys that have no effect beside these.
    root: the schema, PretrainConfig or FinetuneConfig.
    to_run: whether shards and run folder must be named, as for a run; a recipe can be inspected without them.
    Raises `ConfigError`, which names the first problem with its place and counts the others.
    """
    below = _read(path)
    settings = below | _read_overrides(overrides)
    for name in (*(given or {}), *unused):
        if settings.get(name, _NOTHING).value is not None and settings[name].level == _TOP:
            raise ConfigError(f"{name} is set, and an object is given in its place", "leave one of the two out")
    settings |= _from_python(given or {}, level=_TOP + 1)
    _require_no_secrets(settings)
    settings = _with_named_sources(settings)
    notes = _scale_warmup(settings, below, root)
    dropped: dict[str, str] = {}  # what became of each key that gave way
    while True:
        config = validated({name: setting.value for name, setting in settings.items()}, root)
        if isinstance(config, list):
            raise _error(config, settings)
        found = _problems(config, to_run=to_run)
        problems = [p for p in found if not p.of_command_line or settings.get(p.key, _NOTHING).level == _TOP]
        loser, winner = next((pair for problem in problems for pair in _giving_way(problem, settings)), (None, ""))
        if loser is None:
            break
        gone = settings.pop(loser)
        dropped[loser] = f"default: {winner} ({settings[winner].origin}) replaces {gone.origin}"
    if problems:
        raise _error(problems, settings)
    origins = {name: settings[name].origin if name in settings else "default" for name in all_keys(root)}
    return LoadedConfig(config, origins | dropped, tuple(notes))


def read_setting(path: str | Path, overrides: Sequence[str], key: str) -> Any:
    """Return the value that a file with overrides gives to a key, unchecked; None if it gives none."""
    return (_read(path) | _read_overrides(overrides)).get(key, _NOTHING).value


def cut_settings(text: str) -> list[str]:
    """Split a text into settings as a shell does: quote a value that contains spaces. Raises ConfigError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"it cannot be split into settings ({error})", "close its quotes") from None


def require_consistent(config: RunConfig) -> None:
    """Raise `ConfigError` for the first rule between keys that does not hold: for a config made from a loaded one."""
    if problems := [problem for problem in _problems(config, to_run=True) if not problem.of_command_line]:
        raise _error(problems, {})


def _problems(config: RunConfig, *, to_run: bool) -> list[Problem]:
    """Return what the rules of the config's stage find."""
    stage: Any = {PretrainConfig: pretrain_rules, FinetuneConfig: finetune_rules}[type(config)]
    rules = (*stage.TO_RUN, *stage.RULES) if to_run else stage.RULES
    return [problem for rule in rules for problem in rule(config)]


def _giving_way(problem: Problem, settings: Mapping[str, _Setting]) -> list[tuple[str, str]]:
    """Return the pairs of keys of which the first was set below the second."""
    pairs = [pair for pair in problem.gives_way if pair[0] in settings and pair[1] in settings]
    return [(loser, winner) for loser, winner in pairs if settings[loser].level < settings[winner].level]


def _require_no_secrets(settings: Mapping[str, _Setting]) -> None:
    """Raise `ConfigError` for an address with a password or token, which RUN/config.yaml would keep."""
    for setting in settings.values():
        texts = setting.value if isinstance(setting.value, list) else [setting.value]
        for text in texts:
            if isinstance(text, str):
                require_no_secret(text, setting.place)


def _with_named_sources(settings: Mapping[str, _Setting]) -> dict[str, _Setting]:
    """Return the settings with KIND:NAME in place of a bare path to a run, an export or a weights file."""
    named = {name: setting for name in _SOURCES if isinstance((setting := settings.get(name, _NOTHING)).value, str)}
    changed = {name: replace(setting, value=named_source(setting.value)) for name, setting in named.items()}
    teachers = settings.get("distill.teachers", _NOTHING)
    if isinstance(teachers.value, list):
        sources = [named_source(source) if isinstance(source, str) else source for source in teachers.value]
        changed["distill.teachers"] = replace(teachers, value=sources)
    return {**settings, **changed}


def _scale_warmup(settings: dict[str, _Setting], below: Mapping[str, _Setting], root: type[Root]) -> list[str]:
    """Shorten a file's warm-up in place if the command line alone sets the epochs, to no more than the warm-up has.

    Returns a line that says so.
    """
    epochs, warmup = (f"optim.{name}" for name in ("epochs", "warmup_epochs"))
    default = {name: _Setting(all_keys(root)[name].default, "default", name, -MOST_FILES) for name in (epochs, warmup)}
    now, before, old = settings.get(epochs), below.get(epochs, default[epochs]), settings.get(warmup, default[warmup])
    if now is None or now.level < _TOP or old.level == _TOP:
        return []
    if not all(type(setting.value) in (int, float) for setting in (now, before, old)):
        return []
    if not 0 < now.value <= old.value < before.value:
        return []
    value = float(f"{old.value * now.value / before.value:.6g}")
    origin = f"{old.origin}, scaled: {old.value:g} of {before.value:g} epochs"
    settings[warmup] = _Setting(value, origin, old.place, old.level)
    return [
        f"note     warm-up {value:g} of {now.value:g} epochs, in proportion to the config's {old.value:g} of "
        f"{before.value:g} (optim.warmup_epochs=... sets another)"
    ]


def _error(problems: Sequence[Problem], settings: Mapping[str, _Setting]) -> ConfigError:
    """Return an error with the first problem in full, at its place, and the other keys that have one."""
    first = problems[0]
    keys = list(dict.fromkeys(problem.key for problem in problems if problem.key != first.key))
    more = f" (other problems: {join_first(keys, 4)})" if keys else ""
    place = settings[first.key].place if first.key in settings else first.key
    return ConfigError(f"{place}: {first.cause}{more}", first.remedy)


def _read(path: str | Path | RunConfig | Mapping[str, Any]) -> dict[str, _Setting]:
    """Return the settings of a file, with what it extends, or of a config or mapping from Python."""
    if isinstance(path, str | Path):
        return _read_file(find_config(path), extended_by=(), read=[])
    return _from_python(path, level=0)


def _read_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, _Setting]:
    """Return the settings above those of a file, the later ones of a key."""
    if isinstance(overrides, Mapping):
        return _from_python(overrides, level=_TOP)
    settings: dict[str, _Setting] = {}
    for override in overrides:
        settings |= _read_override(override)
    return settings


def _read_file(path: Path, *, extended_by: tuple[Path, ...], read: list[Path]) -> dict[str, _Setting]:
    """Return the settings of a file, merged over those of the files that it extends.

    extended_by: the chain of files that led to this one. read: all files so far; this one is added.
    """
    read.append(path)
    if len(read) > MOST_FILES:
        raise ConfigError(f"{path}: {read[0]} extends more than {MOST_FILES} files", "extend fewer of them")
    try:
        leaves = read_file(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}", _nearest_files(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        remedy = "name a YAML file in UTF-8, or a config that comes with maedistill, e.g. imagenet/dmae_vit_b"
        raise ConfigError(f"{path} cannot be read: {error}", remedy) from None
    whole, _ = leaves.pop("", (None, 1))  # the whole content, if it is not a non-empty mapping
    if whole not in (None, {}):
        cause = f"{path}: a config file is a mapping of `key: value`, not a list or text"
        raise ConfigError(cause, "see `maedistill pretrain imagenet/mae_vit_b --print-config`")
    extends, line = leaves.pop("extends", ([], 0))
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        cause = f"{path}:{line} extends: expected a file name or a list of them"
        raise ConfigError(cause, "write `extends: base.yaml`")
    settings: dict[str, _Setting] = {}
    for name in names:
        base, chain = find_config(name, beside=path), (*extended_by, path)
        if base.resolve() in [other.resolve() for other in chain]:
            circle = " -> ".join(map(str, (*chain, base)))
            cause = f"{path}:{line} extends: the files extend each other: {circle}"
            raise ConfigError(cause, "remove one of these `extends`")
        if not os.path.isfile(base):  # not base.is_file(), which raises for a name that is too long
            raise ConfigError(f"{path}:{line} extends: there is no file {base}", _nearest_files(base))
        settings |= _read_file(base, extended_by=chain, read=read)
    own = {
        n: _Setting(value, f"{path}:{at}", f"{path}:{at} {n}", -len(extended_by)) for n, (value, at) in leaves.items()
    }
    return settings | own


def _nearest_files(path: Path) -> str:
    """Return a remedy for a missing file: YAML files of similar names around the nearest existing folder."""
    folder = next((parent for parent in path.parents if os.path.isdir(parent)), Path())
    files = sorted(str(file) for pattern in ("*.yaml", "*/*.yaml") for file in folder.glob(pattern))
    ours = [file for file in CONFIGS.glob("*/*.yaml") if file.stem != "base"]  # what others extend is no recipe
    names = [] if path.suffix == ".yaml" else sorted(map(config_name, ours))
    near = difflib.get_close_matches(str(path), [*files, *names], n=3, cutoff=0.6) or files[:3]
    return f"did you mean {' or '.join(near)}?" if near else f"{folder} holds no .yaml files; name one that exists"


def _from_python(values: RunConfig | Mapping[str, Any], *, level: int, prefix: str = "") -> dict[str, _Setting]:
    """Return the settings of a config, or of a mapping: nested, with dotted names, or both."""
    if isinstance(values, RunConfig):
        values = values.model_dump(mode="json", exclude_defaults=True)
    settings: dict[str, _Setting] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            settings |= _from_python(value, level=level, prefix=f"{name}.")
            continue
        settings[name] = _Setting(_plain(value, name), PYTHON, f"{PYTHON} {name}", level)
    return settings


def _plain(value: Any, name: str) -> Any:
    """Return a value from Python as a file would give it, items included. Raises ConfigError if it cannot be one."""
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item, name) for key, item in value.items()}
    value = str(value) if isinstance(value, Path) else value
    if not isinstance(value, str | int | float | None):
        raise ConfigError(f"{name}: a {type(value).__name__} is not a setting", "use text, a number or a list")
    if isinstance(value, str) and UNPRINTABLE.search(value):
        raise ConfigError(f"{name}: text with line breaks or control characters", "write one plain line")
    return value


def _read_override(text: str) -> dict[str, _Setting]:
    """Return the settings of one `key=value`; several if the value is a mapping."""
    words = masked(" ".join(text.split()))  # before they are cut
    place = f"command line {words}"
    place = place if len(place) <= _LONGEST_PLACE else place[:_LONGEST_PLACE] + "..."
    name, equals, value = text.partition("=")
    if not equals or name.split() != [name] or name.startswith("-"):
        raise ConfigError(f"{place}: not of the form key=value", "overrides look like optim.epochs=300, without dashes")
    try:
        leaves = read_document(value, prefix=name)
    except Refusal as error:
        remedy = f"{error.remedy}; on a command line '\"...\"' is text as it stands"
        raise ConfigError(f"{place}: {error.cause}", remedy) from None
    return {leaf: _Setting(value, COMMAND_LINE, place, _TOP) for leaf, (value, _) in leaves.items()}
