"""Checks single settings against the schema: unknown keys, wrong types, values out of range, each as a `Problem`.

The input is a flat dict of settings; the output is a frozen config of the given stage, or a list of problems. Only
pydantic decides what is valid. Our messages replace its own: they name the key as the user wrote it and say what to
write instead.
"""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import ELSEWHERE, Key, all_keys, all_sections, nearest_keys, nested
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.schema import RunConfig
from maedistill.config.shared_rules import Problem
from maedistill.errors import join_first

STAGES: dict[str, type[PretrainConfig] | type[FinetuneConfig]]
STAGES = {PretrainConfig.stage: PretrainConfig, FinetuneConfig.stage: FinetuneConfig}
Root = TypeVar("Root", bound=RunConfig)


def validated(values: Mapping[str, Any], root: type[Root]) -> Root | list[Problem]:
    """Return the config that `values` (by dotted name; defaults for the rest) make, or all problems with them."""
    keys, sections = all_keys(root), all_sections(root)
    settings = {name: value for name, value in values.items() if name in keys}
    # A section that is set to an empty mapping sets nothing.
    problems = [
        unknown_key(name, root, value)
        for name, value in values.items()
        if name not in keys and not (name in sections and value == {})
    ]
    try:
        # As JSON: given Python objects, strict mode would reject a list where the schema has a tuple.
        config = root.model_validate_json(json.dumps(nested(settings)))
    except ValidationError as error:
        # A location goes on below the key, with list indices and union members, and a union reports one for each.
        places = (".".join(map(str, e["loc"][:end])) for e in error.errors() for end in range(1, len(e["loc"]) + 1))
        wrong = dict.fromkeys(place for place in places if place in settings)
        return problems + [_wrong_value(keys[name], settings[name]) for name in wrong]
    return problems or config


def unknown_key(name: str, root: type[RunConfig], value: Any = None) -> Problem:
    """Return the problem with a name that is not a key: a typo, a wrong section or stage, a section or key misused."""
    keys, sections = all_keys(root), all_sections(root)
    parent = name.rpartition(".")[0]
    if name in sections:
        return Problem(
            name,
            f"{name} is a section of keys and cannot be set to {_quoted(value)}",
            f"set its keys instead: {join_first([key for key in keys if key.startswith(f'{name}.')])}",
        )
    if parent in keys:
        words = keys[parent].words
        return Problem(name, f"{parent} is not a section, it takes {words}", f"set {parent} itself, to {words}")
    if name == "extends":
        return Problem(name, "extends works only in a file", "name the other file as CONFIG")
    if remedy := ELSEWHERE.get(name.rpartition(".")[2]):
        return Problem(name, f"unknown key {name}", remedy)
    for other in STAGES.values():
        foreign_sections = all_sections(other).keys() - sections.keys()
        if name in all_keys(other) or name.partition(".")[0] in foreign_sections:
            tool = f"maedistill {other.stage}"
            return Problem(name, f"{name} belongs to {other.title} ({tool})", f"remove it, or run {tool}")
    near = nearest_keys(name, root)
    remedy = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"sections are {', '.join(s for s in sections if '.' not in s)}; --explain SECTION lists the keys of one"
    )
    return Problem(name, f"unknown key {name}", remedy)


def _quoted(value: Any) -> str:
    """Return a value as an error message shows it, shortened."""
    if isinstance(value, str):
        text = f"the text {value!r}"
    elif isinstance(value, dict):
        text = "a mapping"
    else:
        text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _wrong_value(key: Key, value: Any) -> Problem:
    return Problem(key.name, f"expected {key.words}, got {_quoted(value)}", _remedy(key, value))


def _remedy(key: Key, value: Any) -> str:
    """Return what to write instead of `value`."""
    explain = f"--explain {key.name} says what it does"
    if key.choices:
        near = difflib.get_close_matches(str(value).lower(), key.choices, n=1, cutoff=0.5)
        return f"did you mean {near[0]}? {explain}" if near else f"write {' or '.join(key.choices)}; {explain}"
    if key.words.startswith("true or false"):
        return f"write {key.words}: yes, no, on, off, 0 and 1 are not accepted"
    if key.words.startswith("text") and type(value) in (int, float, bool):
        return f'put it in quotes, so that it is text: \'"{json.dumps(value)}"\' on a command line, "..." in a file'
    items = (str,) if "of texts" in key.words else (int, float)
    if re.match(r"a list of (?!\d)", key.words) and type(value) in items:  # not one of a fixed length
        return f"put it in brackets: [{json.dumps(value)}]"
    if key.words.startswith("a whole number") and isinstance(value, float) and value.is_integer():
        return f"write {value:.0f}, without a point or an exponent"
    if key.default is not None:
        return f"the default is {json.dumps(key.default)}; {explain}"
    return f"write {key.words}; {explain}"
