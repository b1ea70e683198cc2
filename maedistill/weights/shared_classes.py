"""Match a teacher's outputs with the student's classes: identical, or matched by class name.

C classes of the student
"""

from collections import Counter
from collections.abc import Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset

from maedistill.errors import ConfigError
from maedistill.weights.network import Network


def shared_classes(teacher: Network, names: Sequence[str], *, num_classes: int) -> tuple[int, ...] | None:
    """Return the teacher's output index for each student class, [C]; None if classes and order are identical.

    names: of the student's classes, empty if not known. If the names are known on both sides, classes are matched by
    name; otherwise the numbers of classes must be equal. Raises ConfigError if the teacher lacks a student class.
    """
    spellings = class_names(teacher)
    names = names if len(names) == num_classes else ()
    if not spellings or not names:
        if teacher.num_classes == num_classes:
            return None
        whose = "the teacher's" if not spellings else "the student's"
        raise ConfigError(
            f"distill.teachers: {teacher.name} knows {teacher.num_classes:,} classes, the student has {num_classes:,}, "
            f"and {whose} are not known by name",
            "use a teacher of the same classes, or terms on features and relations alone (distill.hints, ...)",
        )
    known = next((one for one in spellings if set(names) <= set(one)), spellings[0])
    often = Counter(known)
    places = {name: place for place, name in enumerate(known) if often[name] == 1}
    if missing := [name for name in names if name not in places]:
        raise ConfigError(
            f"distill.teachers: {teacher.name} does not know {len(missing):,} of the student's {num_classes:,} "
            f"classes, {missing[0]!r} among them",
            "use a teacher of these classes, or terms on features and relations alone (distill.hints, ...)",
        )
    found = tuple(places[name] for name in names)
    return None if found == tuple(range(teacher.num_classes)) else found


def class_names(teacher: Network) -> list[tuple[str, ...]]:
    """Return the names of a teacher's classes in each known spelling; empty if they are not known.

    They are the teacher's own names, or, for ImageNet's class sets, timm's: WordNet ids and their descriptions.
    """
    if len(teacher.classes) == teacher.num_classes:
        return [teacher.classes]
    subset = infer_imagenet_subset(teacher.module) if teacher.name.startswith(("timm:", "hf-hub:")) else None
    if not subset:
        return []
    info = ImageNetInfo(subset)
    return [tuple(info.label_names()), tuple(info.label_descriptions())]
