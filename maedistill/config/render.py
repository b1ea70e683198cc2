"""Renders a config as YAML that loads back equal: with origins for `--print-config`, without for RUN/config.yaml."""

import math
from typing import Any

import yaml

from maedistill.config.document import RESOLVERS
from maedistill.config.keys import flat
from maedistill.config.loader import LoadedConfig
from maedistill.config.schema import RunConfig

WIDEST = 72  # longer lines do not count when comments are aligned


def render_config(loaded: LoadedConfig[RunConfig]) -> str:
    """Return every key with its value and, as an aligned comment, the origin of the value."""
    lines = _lines(loaded.config)
    column = max(len(line) for line, _ in lines if len(line) <= WIDEST)
    return "".join(
        f"{line:<{column}}  # {loaded.origins[name]}\n" if name is not None else f"{line}\n" for line, name in lines
    )


def config_yaml(config: RunConfig) -> str:
    """Return every key with its value; `load_config` of it, with the same root, gives an equal config."""
    return "".join(f"{line}\n" for line, _ in _lines(config))


def _lines(config: RunConfig) -> list[tuple[str, str | None]]:
    """Return (line, dotted key that it sets) pairs; the key is None for the heading of a section."""
    lines: list[tuple[str, str | None]] = []
    opened: list[str] = []
    for name, value in flat(config).items():
        *sections, leaf = name.split(".")
        for depth, section in enumerate(sections):
            if opened[: depth + 1] != sections[: depth + 1]:
                lines.append((f"{'  ' * depth}{section}:", None))
                opened = sections[: depth + 1]
        opened = sections
        lines.append((f"{'  ' * len(sections)}{leaf}: {_scalar_or_list(value)}", name))
    return lines


class _Dumper(yaml.SafeDumper):
    """Quotes text that our loader or another YAML reader would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _regexp, _first in RESOLVERS:
    _Dumper.add_implicit_resolver(_tag, _regexp, _first)


def _scalar_or_list(value: Any) -> str:
    """Return one value on one line, dumped inside a list because PyYAML adds an end mark to a lone scalar."""
    text = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.strip()[1:-1]
