"""Expand students to the rows of a comparison: a student with axes is one row for each combination of their values.

    dmae: {config: d.yaml, axes: {masks: {student_keep_ratio: [0.1, 0.25]}}, finetune_axes: {optim: {lr: [1e-3, 2e-3]}}}
        pre-trained as  dmae_student_keep_ratio_0.1, dmae_student_keep_ratio_0.25
        the rows        dmae_student_keep_ratio_0.1_lr_0.001, ..._0.1_lr_0.002, ..._0.25_lr_0.001, ..._0.25_lr_0.002

A row is trained once per seed. Rows that differ only in fine-tuning share their pre-training.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maedistill.study.schema import Axes, Student

TEACHER_AXIS = "teacher"
_UNFIT = re.compile(r"[^A-Za-z0-9_.+-]+")  # characters not allowed in a folder's name


@dataclass(frozen=True)
class Pretraining:
    """One pre-training of a student or a teacher, its owner. teacher: the name of the study's teacher that it uses."""

    owner: str
    config: str
    set: tuple[str, ...]
    teacher: str | None


@dataclass(frozen=True)
class Row:
    """One network of the comparison. pretraining: name of the pre-training that it starts from; None from scratch."""

    student: str
    pretraining: str | None
    shape_of: str | None
    finetune_set: tuple[str, ...]


def number_of_rows(student: Student) -> int:
    """Return how many rows the student's axes make, without expanding them."""
    return math.prod(len(values) for axes in (student.axes, student.finetune_axes) for values in axes.values())


def all_pretrainings(students: Mapping[str, Student]) -> list[tuple[str, Pretraining]]:
    """Return (name, pre-training) for every student that has a config. Names are unique once the study is checked."""
    found = []
    for name, student in students.items():
        for label, point in _points(student.axes) if student.config is not None else ():
            settings, teacher = (*student.set, *_settings(point)), point.get(TEACHER_AXIS, student.teacher)
            found.append((f"{name}{label}", Pretraining(name, student.config, settings, teacher)))
    return found


def all_rows(students: Mapping[str, Student]) -> list[tuple[str, Row]]:
    """Return (name, row) for every student, in the file's order. Names are unique once the study is checked."""
    rows = []
    for name, student in students.items():
        for before, _ in _points(student.axes):
            pretraining = f"{name}{before}" if student.config is not None else student.pretraining_of
            for after, point in _points(student.finetune_axes):
                more = (*student.finetune_set, *_settings(point))
                rows.append((f"{name}{before}{after}", Row(name, pretraining, student.shape_of, more)))
    return rows


def _points(axes: Axes) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (suffix of the name, {key: value}) for each combination; one empty combination if there are no axes."""
    words = _words(list(axes))
    for values in itertools.product(*axes.values()):
        label = "".join(f"_{word}_{_label(value)}" for word, value in zip(words, values, strict=True))
        yield label, dict(zip(axes, values, strict=True))


def _words(keys: Sequence[str]) -> list[str]:
    """Return the last part of each key, or the whole key if its last part is not unique."""
    leaves = [key.rpartition(".")[2] for key in keys]
    return [leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)]


def _label(value: Any) -> str:
    """Format a value as part of a folder's name: `0.25`, `2-3`, `large.finetuned`."""
    if isinstance(value, list):
        return "-".join(map(_label, value))
    if isinstance(value, str):
        return _UNFIT.sub("-", value.replace("{teacher.", "")).strip("-.")
    return _UNFIT.sub("-", json.dumps(value))


def _settings(point: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in point.items() if key != TEACHER_AXIS
    )
