"""Texts for users: the meaning of a key (`--explain`), and a config as YAML that loads back equal.

The YAML has the origin of each value as a comment for `--print-config`, and none in RUN/config.yaml.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import yaml

from maedistill.config.document import RESOLVERS
from maedistill.config.keys import Key, all_keys, all_sections
from maedistill.config.loader import LoadedConfig
from maedistill.config.schema import RunConfig
from maedistill.config.values import unknown_key
from maedistill.errors import ConfigError

KINDS = {
    "result": "changes the numbers of a run; a run folder continues with the same value only",
    "runtime": "changes speed, place or noise, not the numbers; free to change when a run is continued",
}
WIDEST = 72  # longer lines do not count when comments are aligned


def explain(name: str, root: type[RunConfig]) -> str:
    """Return a key's meaning, type, default and kind, or a section's keys; of no name, the sections and other keys.

    Raises `ConfigError` for an unknown name.
    """
    sections, keys = all_sections(root), all_keys(root)
    if not name:
        rows = [(section, doc) for section, doc in sections.items() if "." not in section]
        return _table("--explain NAME says more of one", rows, [key for key in keys.values() if "." not in key.name])
    if name in sections:
        of_it = [key for key in keys.values() if key.name.startswith(f"{name}.")]
        return _table(f"{name}: {sections[name]}", [], of_it)
    if (key := keys.get(name)) is None:
        problem = unknown_key(name, root)
        raise ConfigError(f"{name}: {problem.cause}", problem.remedy)
    return (
        f"{key.name}: {key.doc}\n"
        f"  takes    {key.words}\n"
        f"  default  {json.dumps(key.default)}\n"
        f"  kind     {key.kind}: {KINDS[key.kind]}"
    )


def _table(head: str, rows: Sequence[tuple[str, str]], keys: Sequence[Key]) -> str:
    rows = [*rows, *((f"{key.name}={json.dumps(key.default)}", key.doc) for key in keys)]
    column = max(len(setting) for setting, _ in rows)
    return "\n".join([head, *(f"  {setting:<{column}}  {doc}" for setting, doc in rows)])


def render_config(loaded: LoadedConfig[Any]) -> str:
    """Return every key with its value and, as an aligned comment, the origin of the value."""
    lines, origins = config_yaml(loaded.config).splitlines(), iter(loaded.origins.values())
    column = max(len(line) for line in lines if len(line) <= WIDEST)
    return "".join(f"{line}\n" if line.endswith(":") else f"{line:<{column}}  # {next(origins)}\n" for line in lines)


def config_yaml(config: RunConfig) -> str:
    """Return every key with its value on one line; `load_config` of it, with the same root, gives an equal config."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=math.inf, allow_unicode=True
    )


class _Dumper(yaml.SafeDumper):
    """Quotes text that our loader or another YAML reader would read as another type, or as part of a list."""

    yaml_implicit_resolvers: ClassVar[dict[str | None, Any]] = {
        **yaml.SafeDumper.yaml_implicit_resolvers,
        None: RESOLVERS,
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def analyze_scalar(self, scalar: str) -> Any:
        analysis = super().analyze_scalar(scalar)
        analysis.allow_block_plain = analysis.allow_flow_plain
        return analysis

    def represent_list(self, data: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)
