"""Validation of a study file beyond the types of its keys: names, references, axes, placeholders.

Each rule yields (key, cause, remedy) per problem; `file.py` adds the line.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from maedistill.study.placeholders import wrong_placeholder
from maedistill.study.rows import TEACHER_AXIS, all_pretrainings, all_rows, number_of_rows
from maedistill.study.schema import OWN_KEYS, Student, Study, Teacher

MOST_RUNS = 300  # of one start; more is likely a typo, or should be several studies
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_LONGEST_NAME = 120  # characters of a row's name, which names a folder
_TAKEN = "logs"  # a subfolder of OUT
_MOST_OFFERED = 8

Problem = tuple[str, str, str]


def problems(study: Study) -> Iterator[Problem]:
    """Yield every problem of a study. Rows are only expanded if there are at most MOST_RUNS of them."""
    if not study.seeds or len(set(study.seeds)) != len(study.seeds):
        yield "seeds", f"{list(study.seeds)} is not a list of different seeds", "write e.g. [0, 1, 2]"
    if not study.students:
        yield "students", "there are none", "configs/cifar10/study_methods.yaml shows how they are written"
    yield from _names(study)
    yield from _teachers(study.teachers)
    for name, student in study.students.items():
        yield from _parts(f"students.{name}", student)
        yield from _axes(f"students.{name}", student, study.teachers)
    yield from _rows(study)
    yield from _texts(study)


def reserved_key_error(text: str) -> str | None:
    """Return why the `key=value` cannot be set for runs of a study; None if it can."""
    key = text.partition("=")[0]
    return f"the study sets {key} itself" if key in OWN_KEYS else None


def offered(names: Iterable[str]) -> str:
    """Format the first few names for the remedy of an error."""
    names = list(names)
    more = f" and {len(names) - _MOST_OFFERED} more" if len(names) > _MOST_OFFERED else ""
    return ", ".join(names[:_MOST_OFFERED]) + more


def _names(study: Study) -> Iterator[Problem]:
    for section, names in (("teachers", study.teachers), ("students", study.students)):
        for name in names:
            if not _NAME.fullmatch(name) or name == _TAKEN:
                remedy = f"use letters, digits, - and _, and not {_TAKEN}"
                yield f"{section}.{name}", f"{name} cannot name a folder of runs", remedy
            if section == "students" and name in study.teachers:
                yield f"students.{name}", "a teacher has that name", "give one of them another"


def _teachers(teachers: Mapping[str, Teacher]) -> Iterator[Problem]:
    """Check that each teacher has exactly one way to begin.

    A teacher that reuses another's pre-training must be fine-tuned, else the two are identical.
    """
    above: list[str] = []
    for name, teacher in teachers.items():
        key = f"teachers.{name}"
        if (teacher.config is None) == (teacher.pretraining_of is None):
            cause = "it has neither config nor" if teacher.config is None else "it has both config and"
            remedy = "use one (config: it is pre-trained; pretraining_of: as a teacher above it)"
            yield key, f"{cause} pretraining_of", remedy
        if teacher.pretraining_of is None:
            above.append(name)
            continue
        if teacher.pretraining_of not in above:
            remedy = f"use {offered(above)}" if above else "a teacher with a config must stand above it"
            yield f"{key}.pretraining_of", f"{teacher.pretraining_of} is no pre-trained teacher above it", remedy
        if teacher.set:
            yield f"{key}.set", "it is for pre-training, and this teacher has none of its own", "use finetune_set"
        if not teacher.finetune:
            yield f"{key}.pretraining_of", "without fine-tuning it is the same network", "add finetune: true"


def _parts(key: str, student: Student) -> Iterator[Problem]:
    """Check that a student has at most one way to begin, and that only a pre-trained one has keys for pre-training."""
    ways = [way for way in ("config", "pretraining_of", "shape_of") if getattr(student, way) is not None]
    if len(ways) > 1:
        remedy = "config: it is pre-trained; pretraining_of: as another one; shape_of: from scratch"
        yield key, f"it has both {ways[0]} and {ways[1]}", f"keep one of them ({remedy})"
    if student.config is None:
        for part, instead in (("set", "use finetune_set"), ("axes", "use finetune_axes"), ("teacher", "remove it")):
            if getattr(student, part):
                yield f"{key}.{part}", "it is for pre-training, and this student has none of its own", instead


def _axes(key: str, student: Student, teachers: Mapping[str, Teacher]) -> Iterator[Problem]:
    for part, axes in (("axes", student.axes), ("finetune_axes", student.finetune_axes)):
        for axis, values in axes.items():
            if not values:
                yield f"{key}.{part}.{axis}", "it has no values", "list some, e.g. [0.25, 0.5], or remove it"
    if TEACHER_AXIS in student.finetune_axes:
        remedy = 'name the key that takes it, with "{teacher.NAME.finetuned}" among its values'
        yield f"{key}.finetune_axes.{TEACHER_AXIS}", "teacher is for pre-training", remedy
    if TEACHER_AXIS in student.axes and student.teacher is not None:
        yield f"{key}.teacher", "its axes name teachers as well", "keep one of them"
    pretrained = [one for one, teacher in teachers.items() if teacher.config is not None]
    named = [("teacher", student.teacher)] if student.teacher is not None else []
    for part, name in [*named, *((f"axes.{TEACHER_AXIS}", name) for name in student.axes.get(TEACHER_AXIS, ()))]:
        if name not in pretrained:
            remedy = f"use {offered(pretrained)}" if pretrained else "add it to teachers"
            yield f"{key}.{part}", f"there is no pre-trained teacher {name}", remedy
        elif any(text.startswith("teacher.source=") for text in student.set):
            yield f"{key}.{part}", "its set names a teacher.source as well", "keep one of them"
    if number_of_rows(student) > MOST_RUNS:
        sizes = " x ".join(str(len(v)) for axes in (student.axes, student.finetune_axes) for v in axes.values())
        cause = f"{sizes} values are {number_of_rows(student):,} rows, and {MOST_RUNS} are the most runs of a study"
        yield key, cause, "give the axes fewer values"


def _rows(study: Study) -> Iterator[Problem]:
    """Check that names of rows and pre-trainings are unique, and that students refer to existing ones."""
    if sum(map(number_of_rows, study.students.values())) > MOST_RUNS:
        yield "students", f"they are more than {MOST_RUNS} rows", "give the axes fewer values, or make two studies"
        return
    trained, rows = all_pretrainings(study.students), all_rows(study.students)
    names = [name for name, _ in rows]
    owners = [(name, row.student) for name, row in rows] + [(name, one.owner) for name, one in trained]
    folders = Counter(name for name, _ in dict.fromkeys(owners)) + Counter(list(study.teachers))
    for name, student in owners:
        if names.count(name) > 1 or folders[name] > 1:
            yield f"students.{student}", f"two networks would be named {name}", "write them as students of other names"
        if len(name) > _LONGEST_NAME:
            remedy = "write it as a student with a name of its own"
            yield f"students.{student}", f"{name[:40]}... has {len(name)} letters, too long for a folder", remedy
    known = [name for name, _ in trained]
    for name, student in study.students.items():
        for part in ("pretraining_of", "shape_of"):
            other = getattr(student, part)
            if other is not None and other not in known:
                remedy = f"use {offered(known)}" if known else "there is none here"
                yield f"students.{name}.{part}", f"{other} is no pre-trained student", remedy
    if study.baseline is not None and study.baseline not in names:
        yield "baseline", f"{study.baseline} is no row", f"rows are {offered(names)}"


def _texts(study: Study) -> Iterator[Problem]:
    """Check that every `key=value` sets a key that is not reserved, and names teachers that are trained before it."""
    above: dict[str, Teacher] = {}
    for name, teacher in study.teachers.items():
        yield from _wrong_texts(f"teachers.{name}.set", teacher.set, above)
        yield from _wrong_texts(f"teachers.{name}.finetune_set", teacher.finetune_set, above)
        above[name] = teacher
    yield from _wrong_texts("finetune.set", study.finetune.set, {})  # no placeholders: teachers use these settings too
    yield from _wrong_texts("pretrain_set", study.pretrain_set, study.teachers)
    yield from _wrong_texts("finetune_set", study.finetune_set, study.teachers)
    for name, student in study.students.items():
        key = f"students.{name}"
        yield from _wrong_texts(f"{key}.set", student.set, study.teachers)
        yield from _wrong_texts(f"{key}.finetune_set", student.finetune_set, study.teachers)
        for part, axes in (("axes", student.axes), ("finetune_axes", student.finetune_axes)):
            for axis, values in axes.items():
                texts = [f"{axis}={value}" for value in values]
                yield from _wrong_texts(f"{key}.{part}.{axis}", texts, study.teachers)


def _wrong_texts(key: str, texts: Iterable[str], teachers: Mapping[str, Teacher]) -> Iterator[Problem]:
    for text in texts:
        if cause := reserved_key_error(text):
            yield key, cause, "remove it"
        if wrong := wrong_placeholder(text, teachers):
            yield key, *wrong
