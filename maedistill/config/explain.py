"""The text of `--explain KEY`: the meaning of a key."""

import json

from maedistill.config.keys import Key, all_keys, all_sections
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.problem import config_error
from maedistill.config.schema import RunConfig
from maedistill.config.values import unknown_key

KINDS = {
    "result": "changes the numbers of a run; a run folder continues with the same value only",
    "runtime": "changes speed, place or noise, not the numbers; free to change when a run is continued",
}


def explain(name: str, *, root: type[RunConfig] = PretrainConfig) -> str:
    """Return a key's meaning, type, default and kind, or a section's keys. Raises `ConfigError` for an unknown name."""
    if name in all_sections(root=root):
        return _section_text(name, root)
    if name not in all_keys(root=root):
        raise config_error([unknown_key(name, root=root)], {})
    return _key_text(all_keys(root=root)[name])


def _key_text(key: Key) -> str:
    return (
        f"{key.name}: {key.doc}\n"
        f"  takes    {key.words}\n"
        f"  default  {json.dumps(key.default)}\n"
        f"  kind     {key.kind}: {KINDS[key.kind]}"
    )


def _section_text(name: str, root: type[RunConfig]) -> str:
    keys = [key for key in all_keys(root=root).values() if key.name.startswith(f"{name}.")]
    rows = [(f"{key.name}={json.dumps(key.default)}", key.doc) for key in keys]
    column = max(len(setting) for setting, _ in rows)
    head = f"{name}: {all_sections(root=root)[name]}"
    return "\n".join([head, *(f"  {setting:<{column}}  {doc}" for setting, doc in rows)])
