"""Which outputs of a teacher are the student's classes: the same, or found by their names.

C classes of the student
"""

from collections.abc import Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset

from maedistill.errors import ConfigError
from maedistill.models.network import Network


def shared_classes(teacher: Network, names: Sequence[str], *, num_classes: int) -> tuple[int, ...] | None:
    """The teacher's output for each of the student's classes, [C]; None where all are the same in the same order.

    names: of the student's classes, empty where they are not known. Where both sides' names are known they decide;
    otherwise the numbers of classes must be equal. Raises ConfigError for a teacher of other classes.
    """
    known = class_names(teacher)
    names = names if len(names) == num_classes else ()
    if not known or not names:
        if teacher.num_classes == num_classes:
            return None
        whose = "the teacher's" if not known else "the student's"
        raise ConfigError(
            f"distill.teachers: {teacher.name} knows {teacher.num_classes:,} classes, the student has {num_classes:,}, "
            f"and {whose} are not known by name",
            "use a teacher of the same classes, or terms on features and relations alone (distill.hints, ...)",
        )
    places = {name: place for place, name in enumerate(known)}
    if missing := [name for name in names if name not in places]:
        raise ConfigError(
            f"distill.teachers: {teacher.name} does not know {len(missing):,} of the student's {num_classes:,} "
            f"classes, {missing[0]!r} among them",
            "use a teacher of these classes, or terms on features and relations alone (distill.hints, ...)",
        )
    found = tuple(places[name] for name in names)
    return None if found == tuple(range(teacher.num_classes)) else found


def class_names(teacher: Network) -> tuple[str, ...]:
    """The names of a teacher's classes, as it says or, of ImageNet's label sets, as timm knows; empty if unknown."""
    if len(teacher.classes) == teacher.num_classes:
        return teacher.classes
    subset = infer_imagenet_subset(teacher.module) if teacher.name.startswith(("timm:", "hf-hub:")) else None
    return tuple(ImageNetInfo(subset).label_names()) if subset else ()
