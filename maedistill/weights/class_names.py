"""Match a model's outputs with classes by name: those of some shards, or those of a student.

    compare_names     check that model and shards number their classes alike, or warn, or raise
    subset_columns    for shards with some of the model's classes (ImageNet-A, -R, ten of a thousand): output per label
    shared_classes    for a teacher: output per class of the student

timm's models seldom name their classes. A model with as many classes as a known ImageNet set (1,000, 11,821 and so on)
is assumed to have that set's classes, in the order of timm's `ImageNetInfo`. Names may be WordNet ids or descriptions.

    C classes of the shards or of the student
"""

from collections.abc import Sequence

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from maedistill.errors import ConfigError, DataError
from maedistill.weights.network import Network


def subset_columns(known: Sequence[str], given: Sequence[str], *, num_known: int, model: str) -> Tensor:
    """Return the model's output index for each class of the shards, matched by name: int64 [C].

    known: names of the model's `num_known` classes, empty if it has none; given: the shards' names. Raises ConfigError
    if either has no names; DataError for a name that the model lacks, or has twice.
    """
    if not given:
        raise ConfigError(
            "--subset matches classes by name, and the shards' index holds no class names",
            "write the shards again from an image folder (maedistill shards), or put classes.json beside them",
        )
    spellings = [tuple(known)] if known else _imagenet_names(num_known)
    if not spellings:
        raise ConfigError(
            f"--subset matches classes by name, and {model} does not name its {num_known:,} classes",
            "evaluate a run, an export, or a model with the classes of an ImageNet set",
        )
    indices, unmatched = _match(given, spellings)
    if unmatched:
        name = unmatched[0]
        count = max(names.count(name) for names in spellings)
        how = f"has {count} classes called {name!r}" if count else f"has no class {name!r}"
        raise DataError(
            f"{model} {how} ({len(unmatched)} of the shards' {len(given):,} names are affected)",
            f"name the shards' classes as the model does, e.g. {', '.join(map(repr, spellings[0][:3]))}",
        )
    return torch.tensor(indices)


def compare_names(
    known: tuple[str, ...], given: tuple[str, ...], *, num_known: int, model: str, other: str = "the shards"
) -> list[str]:
    """Return a warning if the classes of `model` (`known`) and of the `other` (`given`) differ; empty if not known.

    Raises DataError if they have the same names in another order, since every count would then be wrong.
    """
    if given and not known and num_known != len(given):
        numbers = f"{model} has {num_known:,} classes without names, {other} {len(given):,}"
        return [f"{numbers}: are they the same ones? (maedistill evaluate --subset matches them by name)"]
    label = next((i for i, (own, theirs) in enumerate(zip(known, given, strict=False)) if own != theirs), None)
    if label is None:  # all names are equal, or not known, or one has more classes and the first ones are equal
        return []
    if sorted(known) == sorted(given):
        raise DataError(
            f"{model} and {other} number their classes differently: label {label} is {known[label]!r} to it and "
            f"{given[label]!r} in {other}",
            "match them by name with maedistill evaluate --subset, or write the shards in the model's order of classes",
        )
    named = f"label {label} is {known[label]!r} in the model, {given[label]!r} in {other}"
    return [f"{model} and {other} have different class names: {named} (maedistill evaluate --subset matches by name)"]


def shared_classes(teacher: Network, names: Sequence[str], *, num_classes: int) -> tuple[int, ...] | None:
    """Return the teacher's output index for each student class, [C]; None if classes and order are identical.

    names: of the student's classes, empty if not known. If the names are known on both sides, classes are matched by
    name; otherwise the numbers of classes must be equal. Raises ConfigError if the teacher lacks a student class.
    """
    spellings = [teacher.classes] if len(teacher.classes) == teacher.num_classes else []
    if not spellings and teacher.name.startswith(("timm:", "hf-hub:")):
        spellings = _imagenet_names(teacher.num_classes)
    names = names if len(names) == num_classes else ()
    if not spellings or not names:
        if teacher.num_classes == num_classes:
            return None
        whose = "the teacher's" if not spellings else "the student's"
        raise ConfigError(
            f"distill.teachers: {teacher.name} knows {teacher.num_classes:,} classes, the student has {num_classes:,}, "
            f"and {whose} are not known by name",
            "use a teacher with the same classes, or only terms on features and relations (distill.hints, ...)",
        )
    indices, unmatched = _match(names, spellings)
    if unmatched:
        raise ConfigError(
            f"distill.teachers: {teacher.name} does not know {len(unmatched):,} of the student's {num_classes:,} "
            f"classes, {unmatched[0]!r} among them",
            "use a teacher with these classes, or only terms on features and relations (distill.hints, ...)",
        )
    return None if indices == list(range(teacher.num_classes)) else tuple(indices)


def _match(names: Sequence[str], spellings: Sequence[Sequence[str]]) -> tuple[list[int], list[str]]:
    """Return the index of each name in any of the spellings, and the names that occur in none of them, or twice."""
    indices: dict[str, list[int]] = {}
    for spelling in spellings:
        for index, name in enumerate(spelling):
            indices.setdefault(name, []).append(index)
    unmatched = [name for name in names if len(indices.get(name, ())) != 1]
    return [indices[name][0] for name in names if name in indices], unmatched


def _imagenet_names(num_classes: int) -> list[tuple[str, ...]]:
    """Return the class names of the ImageNet set with `num_classes` classes, in all spellings; empty if none exists."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return []
    info = ImageNetInfo(subset)
    return [tuple(info.label_names()), tuple(info.label_descriptions())]
