"""Match a model's outputs with the classes of some shards: the same classes, or a subset found by name.

    compare_names     check that model and shards number their classes alike, or warn, or raise
    subset_columns    for shards with some of the model's classes (ImageNet-A, -R, ten of a thousand): output per label

timm's models seldom name their classes. A model with as many classes as a known ImageNet set (1,000, 11,821 and so on)
is assumed to have that set's classes, in the order of timm's `ImageNetInfo`. Names may be WordNet ids or descriptions.

    C classes of the shards
"""

from collections.abc import Sequence

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from maedistill.errors import ConfigError, DataError


def subset_columns(known: Sequence[str], given: Sequence[str], *, num_known: int, model: str) -> Tensor:
    """Return the model's output index for each class of the shards, matched by name: int64 [C].

    known: names of the model's `num_known` classes, empty if it has none; given: the shards' names. Raises ConfigError
    if either has no names; DataError for a name that the model lacks, or has twice.
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
    """Return a warning if the classes of `model` (`known`) and of the shards (`given`) differ; empty if not known.

    Raises DataError if they have the same names in another order, since every count would then be wrong.
    """
    if given and not known and num_known != len(given):
        numbers = f"{model} has {num_known:,} classes without names, the shards {len(given):,}"
        return [f"warning  {numbers}: are they the same ones? (--subset matches them by name)"]
    if not known or not given or known == given:
        return []
    label = next((i for i, names in enumerate(zip(known, given, strict=False)) if names[0] != names[1]), None)
    if label is None:  # one has more classes than the other, and the first ones are equal
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
    """Return the class names of the ImageNet set with `num_classes` classes, in all spellings; empty if none exists."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return []
    info = ImageNetInfo(subset)
    return [tuple(info.label_names()), tuple(info.label_descriptions())]
