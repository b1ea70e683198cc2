"""The keys of a stage's schema by dotted name: type in words, default, kind, doc; and suggestions for an unknown key.

Everything is derived from pydantic's JSON schema of the stage's root, so a key is described in one place only. A dotted
name has one part or more: `seed`, `optim.lr` or `distill.logits.weight`. Settings are passed through the package as
flat dicts from names to values.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any, Literal

from maedistill.config.schema import RunConfig
from maedistill.errors import join_first

# Names on MAE's and timm's command lines and in papers, and our keys for them, of either stage.
ALIASES = {
    "aa": ("augment.rand_augment",),
    "accum_iter": ("engine.micro_batch",),
    "batch_size": ("optim.global_batch", "engine.micro_batch"),
    "blr": ("optim.base_lr",),
    "clip_grad": ("optim.clip",),
    "data_path": ("data.train",),
    "finetune": ("init.source",),
    "input_size": ("data.image_size",),
    "mask_ratio": ("masks.student_keep_ratio",),
    "nb_classes": ("data.num_classes",),
    "num_workers": ("data.workers",),
    "output_dir": ("run",),
    "reprob": ("augment.erasing",),
}

# What other programs have as settings and here is decided elsewhere, or in another unit.
ELSEWHERE = {
    "burn_in": "use distill.codistillation.start_epoch, in epochs: a share of 0.4 is 0.4 optim.epochs",
    "device": "leave it out: a GPU is used where there is one; CUDA_VISIBLE_DEVICES chooses which",
    "devices": "start one process for each GPU: torchrun --nproc-per-node N -m maedistill ...",
    "gpus": "start one process for each GPU: torchrun --nproc-per-node N -m maedistill ...",
    "resume": "leave it out: the same command continues the run in its folder",
}


@dataclass(frozen=True)
class Key:
    """One key of the schema. `words` describes its type in English, `default` is its JSON value (lists for tuples)."""

    name: str
    kind: Literal["result", "runtime"]
    words: str
    default: Any
    doc: str
    choices: tuple[str, ...]


@cache
def all_keys(root: type[RunConfig]) -> dict[str, Key]:
    """Return every key by dotted name, in the order of the schema."""
    keys = {}
    for name, schema in _schemas(root).items():
        if "properties" not in schema:
            options = schema.get("anyOf", [schema])
            choices = tuple(choice for option in options for choice in option.get("enum", ()))
            words, doc = _in_words(schema), schema["description"]
            keys[name] = Key(name, schema["kind"], words, schema["default"], doc, choices)
    return keys


@cache
def all_sections(root: type[RunConfig]) -> dict[str, str]:
    """Return the doc of every section by name."""
    return {name: schema["description"] for name, schema in _schemas(root).items() if "properties" in schema}


def flat(config: RunConfig) -> dict[str, Any]:
    """Return the values of a config by dotted name, as in JSON, in the order of the schema."""
    values = config.model_dump(mode="json")
    return {name: reduce(dict.__getitem__, name.split("."), values) for name in all_keys(type(config))}


def nested(
    values: Mapping[str, Any], parts: Callable[[str], list[str]] = lambda name: name.split(".")
) -> dict[str, Any]:
    """Invert `flat`: return dicts within dicts. parts: splits a dotted name."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, leaf = parts(name)
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[leaf] = value
    return tree


def result_values(config: RunConfig) -> dict[str, Any]:
    """Return the values of the `result` keys, with which alone a run can continue."""
    return {name: value for name, value in flat(config).items() if all_keys(type(config))[name].kind == "result"}


def differing_keys(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """Return (key, old value, new value) of each `result` key that differs."""
    before, after = result_values(old), result_values(new)
    return [(name, value, after[name]) for name, value in before.items() if value != after[name]]


def changes_text(changes: Sequence[tuple[str, Any, Any]], root: type[RunConfig]) -> str:
    """List the first changes of `differing_keys`; those that bring a section back to its defaults are one entry."""
    sections: dict[str, list[tuple[str, Any, Any]]] = {}
    for change in changes:
        sections.setdefault(change[0].rpartition(".")[0], []).append(change)
    texts = []
    for section, of_it in sections.items():
        if section and len(of_it) > 1 and all(new == all_keys(root)[key].default for key, _, new in of_it):
            before = [f"{key.rpartition('.')[2]}={old!r}" for key, old, _ in of_it]
            texts.append(f"{section}: {join_first(before, 4)} there, only defaults now")
        else:
            texts += [f"{key}: {old!r} there, {new!r} now" for key, old, new in of_it]
    return join_first(texts, 4, separator="; ")


def nearest_keys(name: str, root: type[RunConfig]) -> list[str]:
    """Return at most four keys or sections that `name` may mean, likeliest first: a typo, or a wrong section."""
    keys = all_keys(root)
    names, leaf = [*keys, *all_sections(root)], name.rpartition(".")[2].replace("-", "_")
    if typo := difflib.get_close_matches(name, names, n=1, cutoff=0.85):
        return typo
    if aliased := [key for key in ALIASES.get(leaf, ()) if key in keys]:
        return aliased
    leaves = list(dict.fromkeys(key.rpartition(".")[2] for key in keys))
    near = [leaf] if leaf in leaves else difflib.get_close_matches(leaf, leaves, n=2, cutoff=0.75)
    same_leaf = [key for other in near for key in keys if key.rpartition(".")[2] == other]
    return same_leaf[:4] or difflib.get_close_matches(name, names, n=3, cutoff=0.55)


@cache
def _schemas(root: type[RunConfig]) -> dict[str, dict[str, Any]]:
    """Return the JSON schema of every section and key by dotted name, each section before its contents."""
    whole = root.model_json_schema()

    def walk(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, schema in section["properties"].items():
            below = whole["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
            yield prefix + name, below
            if below is not schema:
                yield from walk(below, f"{prefix}{name}.")

    return dict(walk(whole, ""))


def _in_words(schema: dict[str, Any]) -> str:
    """Describe a JSON schema in English, e.g. "a whole number >= 1, or null"."""
    if "anyOf" in schema:
        return ", or ".join(_in_words(option) for option in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if schema["type"] == "array":
        items = schema.get("prefixItems") or [schema["items"]]
        count = f"{len(items)} " if "prefixItems" in schema else ""
        limits = _limits(items[0])
        each = limits or " or ".join(items[0].get("enum", ()))
        return f"a list of {count}{_NOUNS[items[0]['type']]}s" + (f", each {each}" if each else "")
    if schema["type"] in ("integer", "number"):
        return " ".join(filter(None, ("a", _NOUNS[schema["type"]], _limits(schema))))
    words = {"boolean": "true or false", "null": "null", "string": "text"}[schema["type"]]
    return words + (f" of the form {schema['pattern']}" if "pattern" in schema else "")


_NOUNS = {"integer": "whole number", "number": "number", "string": "text"}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def _limits(schema: dict[str, Any]) -> str:
    bounds = [(sign, schema[name]) for name, sign in _BOUNDS.items() if name in schema]
    return " and ".join(
        f"{sign} {bound:g}" if isinstance(bound, float) else f"{sign} {bound}" for sign, bound in bounds
    )
