"""Find the ViTs that a checkpoint holds, under whatever entries and prefixes, and choose one.

{"state_dict": {...}, "state_dict_ema": {...}}                              -> state_dict, state_dict_ema
{"student": {"module.backbone.cls_token": ...}, "teacher": {...}}           -> student, teacher
{"module.base_encoder.cls_token": ..., "module.momentum_encoder...": ...}   -> base_encoder, momentum_encoder
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

from torch import Tensor

from maedistill.errors import ConfigError, DataError

StateDict = dict[str, Tensor]

# A key that every ViT has, after its prefix: in timm's names, or in those of transformers.
_ANCHOR = re.compile(r"(?:(.+)\.)?(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight")
# What compilation and data parallelism put into names, anywhere.
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DEEPEST = 5  # entries inside entries
_LONGEST_NAME = 100  # characters of a name that an error quotes
# What training goes on with, or in self-distillation what is evaluated; the first that is there is the default.
_USUAL = ("model", "state_dict", "model_state", "teacher")
_AVERAGES = (
    re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)", re.IGNORECASE),
    re.compile(r"(^|[._])(teacher|momentum|target)([._]|$)", re.IGNORECASE),
)


@dataclass(frozen=True)
class Entry:
    """The weights of one network, without their prefix; and what else its state dict holds."""

    weights: StateDict
    others: StateDict
    note: str = ""  # which one it is of several


def choose_entry(content: Mapping[Any, Any], weights: str, *, name: str, key: str) -> Entry:
    """Return the network that `weights` names: an entry, `ema` for a moving average, or `model` for the usual one.

    key: the setting that chooses, for errors. Raises DataError if there are no tensors, ConfigError for a wrong name.
    """
    states = list(_state_dicts(content, (), set()))
    states += _lists(content, states)
    if not states:
        raise DataError(f"{name}: holds no tensors", "use the state dict of a model")
    found = _networks(states)
    if not found and weights == "model":  # what is missing or foreign is named where the weights are renamed
        return Entry(max((state for _, state in states), key=len), {})
    chosen = _choose(list(found), weights)
    if chosen is None:
        held = quoted(list(found), most=8) or "no ViT"
        cause = f"holds {held}: which one is meant?" if weights == "model" else f"has no {weights!r}; it holds {held}"
        raise ConfigError(f"{name}: {cause}", f"set {key} to one of them" if found else f"leave out {key}")
    unused = quoted([other for other in found if other != chosen], most=8)
    note = f"weights of {quoted([chosen])}{f', not of {unused} ({key} chooses)' if unused else ''}; "
    return _split(*found[chosen], note if unused or _is_average(chosen) else "")


def quoted(names: Sequence[str], *, most: int = 3) -> str:
    """Format the first few names of a file for a message: on one line, escaped and shortened."""
    shown = [name if name.isprintable() else ascii(name)[1:-1] for name in names[:most]]
    return ", ".join(name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "..." for name in shown)


def _state_dicts(
    content: Mapping[Any, Any], path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], StateDict]]:
    """Yield every dict of named tensors in `content`, with the names of the entries that lead to it.

    seen: dicts whose entries were looked into, which is done once: a small file may refer to itself many times.
    """
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    if state := {_WRAPPER.sub("", key): value for key, value in named.items() if isinstance(value, Tensor)}:
        yield path, state
    if id(content) not in seen and len(path) < _DEEPEST:
        seen.add(id(content))
        for key, value in named.items():
            if isinstance(value, dict):
                yield from _state_dicts(value, (*path, key), seen)


def _lists(
    content: Mapping[Any, Any], states: Sequence[tuple[tuple[str, ...], StateDict]]
) -> Iterator[tuple[tuple[str, ...], StateDict]]:
    """Yield the averages that a file keeps as a list, without names: torch_ema's and diffusers' `shadow_params`.

    Such a list has the order of the parameters, and takes their names from the state dict that has the same shapes.
    """
    for key, value in content.items():
        for name, part in value.items() if isinstance(value, dict) else ():
            if isinstance(key, str) and isinstance(part, list) and part and isinstance(name, str):
                shapes = [getattr(tensor, "shape", None) for tensor in part]
                same = (state for _, state in states if [tensor.shape for tensor in state.values()] == shapes)
                yield from (((key, name), dict(zip(state, part, strict=True))) for state in islice(same, 1))


def _networks(states: list[tuple[tuple[str, ...], StateDict]]) -> dict[str, tuple[list[str], StateDict]]:
    """Return the parts of each ViT's prefix, and its state dict, by the parts in which paths and prefixes differ."""
    found = {}
    for path, state in states:
        for match in filter(None, map(_ANCHOR.fullmatch, state)):
            prefix = match[1].split(".") if match[1] else []
            found[*path, *prefix] = prefix, state
    common = set.intersection(*map(set, found)) if len(found) > 1 else set()
    names = [".".join(part for part in parts if part not in {*common, "module"}) or "model" for parts in found]
    if len(set(names)) < len(names):
        names = [".".join(parts) for parts in found]
    return dict(zip(names, found.values(), strict=True))


def _split(prefix: list[str], state: StateDict, note: str) -> Entry:
    """Take off the prefix of a network's keys, and from the other keys the parts of it that they share."""
    columns = zip(*(key.split(".") for key in state), strict=False)
    shared = [column[0] for column in takewhile(lambda column: len({*column}) == 1, columns)]
    start, outer = (".".join([*parts, ""]) for parts in (prefix, shared[: len(prefix)]))
    own = {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}
    others = {key[len(outer) :]: value for key, value in state.items() if not key.startswith(start)}
    return Entry(own, others, note)


def _is_average(name: str) -> bool:
    return any(kind.search(name) for kind in _AVERAGES)


def _choose(names: list[str], weights: str) -> str | None:
    """Return which of the networks `weights` means; None if it is not there, or if several may be meant."""
    if weights in names:
        return weights
    if weights == "ema":
        averages = next(filter(None, ([n for n in names if kind.search(n)] for kind in _AVERAGES)), [])
        return averages[0] if len(averages) == 1 else None
    if weights != "model":
        return None
    trained = [name for name in names if not _is_average(name)]
    usual = next((name for name in _USUAL if name in names), None)
    return usual or next((few[0] for few in (names, trained) if len(few) == 1), None)
