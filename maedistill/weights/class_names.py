"""Which outputs of a model are the classes of some shards: the same ones, or a subset found by name.

    compare_names     model and shards count their classes alike, or a warning, or an error
    subset_columns    shards with some of the model's classes (ImageNet-A, -R, ten of a thousand): one output per label

Models of timm seldom name their classes. One with as many as a known ImageNet set has is taken to have that set's, in
the order of timm's `ImageNetInfo`: 1,000, 11,821 and so on. WordNet ids and their words are both understood.

    C classes of the shards
"""

from collections.abc import Sequence

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from maedistill.errors import ConfigError, DataError


def subset_columns(known: Sequence[str], given: Sequence[str], *, num_known: int, model: str) -> Tensor:
    """The model's output for each class of the shards, by name: int64 [C].

    known: the model's names of its `num_known` classes, empty where it has none; given: the shards' names. Raises
    ConfigError where one of them has no names; DataError for a name that the model has not, or has twice.
    """
    if not given:
        raise ConfigError(
            "--subset goes by names, and the shards' index holds no names of classes",
            "write the shards again from an image folder (tools/make_shards.py), or put classes.json beside them",
        )
    spellings = [tuple(known)] if known else _imagenet_names(num_known)
    if not spellings:
        raise ConfigError(
            f"--subset goes by names, and {model} does not name its {num_known:,} classes",
            "evaluate a run, an export of ours, or a model with the classes of an ImageNet set",
        )
    places: dict[str, list[int]] = {}
    for names in spellings:
        for label, name in enumerate(names):
            places.setdefault(name, []).append(label)
    unmatched = [name for name in given if len(places.get(name, ())) != 1]
    if unmatched:
        name = unmatched[0]
        how = f"has {len(places[name])} classes called {name!r}" if name in places else f"has no class {name!r}"
        raise DataError(
            f"{model} {how} ({len(unmatched)} of the shards' {len(given):,} names are such)",
            f"name the shards' classes as the model does, e.g. {', '.join(map(repr, spellings[0][:3]))}",
        )
    return torch.tensor([places[name][0] for name in given])


def compare_names(known: tuple[str, ...], given: tuple[str, ...], *, num_known: int, model: str) -> list[str]:
    """A warning where `model` (`known`) and shards (`given`) have other classes; both names may be empty: not known.

    Raises DataError where they have the same names in another order: every count would be wrong.
    """
    if given and not known and num_known != len(given):
        numbers = f"{model} has {num_known:,} classes without names, the shards {len(given):,}"
        return [f"warning  {numbers}: are they the same ones? (--subset matches them by name)"]
    if not known or not given or known == given:
        return []
    label = next((i for i, names in enumerate(zip(known, given, strict=False)) if names[0] != names[1]), None)
    if label is None:  # one has more classes than the other, the first ones are the same
        return []
    if sorted(known) == sorted(given):
        raise DataError(
            f"{model} and the shards number their classes differently: label {label} is {known[label]!r} to it and "
            f"{given[label]!r} in the shards",
            "match them by name with --subset, or write the shards again with the classes in the model's order",
        )
    named = f"label {label} is {known[label]!r}, not {given[label]!r}"
    return [f"warning  {model} names its classes otherwise: {named} (--subset matches them by name)"]


def _imagenet_names(num_classes: int) -> list[tuple[str, ...]]:
    """The names of an ImageNet set of so many classes, in all spellings; nothing where there is no such set."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return []
    info = ImageNetInfo(subset)
    return [tuple(info.label_names()), tuple(info.label_descriptions())]
