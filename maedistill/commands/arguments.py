"""What the parsers of the subcommands share: their construction, and the types of arguments."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from maedistill.durable import require_local
from maedistill.errors import ConfigError

Spec = TypeVar("Spec")

PEER = "a student of mutual learning: 1 is the first of distill.mutual.students; the run's own needs no option"


def new_parser(program: str, about: str | None, examples: str | None = None) -> argparse.ArgumentParser:
    """Build a parser that prints its description and its examples as they are written."""
    return argparse.ArgumentParser(
        prog=program, description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def spec_of(spec: Callable[..., Spec], arguments: argparse.Namespace, **more: object) -> Spec:
    """Build a dataclass from `more` and, for each other field, the argument of that name, which has to exist."""
    names = {field.name for field in dataclasses.fields(spec)} - more.keys()  # type: ignore[arg-type]
    return spec(**{name: getattr(arguments, name) for name in names}, **more)


def path(text: str) -> Path:
    """Read a path. A shell leaves the ~ of `--out=~/x` to us."""
    return Path(os.path.expanduser(text))  # Path.expanduser raises for an unknown user


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of integers that rejects values below `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} on")
        return int(text)

    return parse


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return a parser of distinct comma-separated values."""

    def parse(text: str) -> list[Any]:
        values = [kind(word) for word in text.split(",")]
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text} is no list of different values")
        return values

    return parse


def number(text: str, *, most: float, reason: str) -> float:
    """Read a finite number above 0 and at most `most`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= most:
        raise argparse.ArgumentTypeError(f"{text} is no {reason}")
    return value


positive = partial(number, most=sys.float_info.max, reason="number above 0")
share = partial(number, most=1.0, reason="share, above 0 and at most 1")


def require_writable(files: dict[str, Path | None]) -> None:
    """Raise ConfigError for a file that cannot be written or is named twice, before the work starts."""
    named: dict[Path, str] = {}
    for name, file in files.items():
        if file is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        require_local(file, flag)
        is_folder = os.path.isdir(file)  # Path.is_dir raises errors of long names and of permissions
        if is_folder or not (os.path.isdir(file.parent) and os.access(file.parent, os.W_OK)):
            problem = "is a folder" if is_folder else f"cannot be written: {file.parent} is no writable folder"
            raise ConfigError(f"{flag}: {file} {problem}", "name a file in a folder that exists")
        if (other := named.setdefault(file.resolve(), flag)) != flag:
            raise ConfigError(f"{other} and {flag} both name {file}", "name two files")
