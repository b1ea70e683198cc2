"""One problem with the settings, and how several problems become one error.

`values.py` and the rules find problems, which know only their keys. `loader.py` knows the file and line where each
key was set, and turns the list into a `ConfigError`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maedistill.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """What is wrong with the value of the dotted `key`, and how to fix it."""

    key: str
    cause: str
    remedy: str


def config_error(problems: Sequence[Problem], places: Mapping[str, str]) -> ConfigError:
    """Return an error with the first problem in full and the keys of the others.

    places: where each key was set, e.g. "run.yaml:12 optim.lr"; a key that was not set is named by itself.
    """
    first, *others = problems
    more = f" (and {len(others)} more: {_listed([p.key for p in others])})" if others else ""
    return ConfigError(f"{places.get(first.key, first.key)}: {first.cause}{more}", first.remedy)


def _listed(names: list[str], most: int = 4) -> str:
    """Join at most `most` of the names, without duplicates."""
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
