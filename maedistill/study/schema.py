"""The schema of a study file: teachers, students that learn from them in different ways, and seeds.

    out: runs/my_study                         # relative to the working directory
    seeds: [0, 1, 2]
    baseline: mae                              # the row that the others are compared with; omitted: none
    teachers:                                  # each trained once, with seed 0; omitted if no student needs one
      large: {config: teacher.yaml, set: [optim.epochs=30], finetune: true}           # also fine-tuned
      early: {init_from: large, finetune: true, finetune_set: [optim.epochs=1]}       # shares large's pre-training
    pretrain_set: [optim.epochs=50]            # for every student's pre-training, not for the teachers'
    finetune_set: [optim.ema=0.999]            # for every student's fine-tuning, not for the teachers'
    students:
      mae: {config: mae.yaml}                  # pre-trained; beside this file, or a name: own/dmae
      dmae: {config: dmae.yaml, set: [align.weight=10, "teacher.source={teacher.large}"]}
      tuned: {init_from: dmae, finetune_axes: {optim: {lr: [1e-3, 2e-3]}}}            # shares dmae's pre-training
      scratch: {same_architecture_as: mae}     # not pre-trained; the network that `mae` is
      plain: {finetune_set: [student.model=vit_tiny_patch16_224]}                     # not pre-trained
      kd:                                      # learns from the teacher's logits and from the labels
        same_architecture_as: mae
        finetune_set: ["distill.teachers=[{teacher.large.finetuned}]", distill.logits.weight=0.9,
          distill.label_weight=0.1]
    finetune: {config: finetune.yaml, set: [optim.layer_decay=0.8]}                   # for every fine-tuning
    lines: {DMAE: [dmae], none: [scratch, plain]}            # rows that a chart joins, over epochs and over minutes

`set` holds `key=value` settings as on a command line, for pre-training; `finetune_set` is for fine-tuning. They name
teachers' runs: `{teacher.NAME}`, its pre-training, in `set`; `{teacher.NAME.finetuned}`, its fine-tuning, in both.
`teacher.source` may be omitted if one teacher is pre-trained. `finetune_axes` map keys to lists of values: every
combination is a row of the comparison, here tuned_lr_0.001 and tuned_lr_0.002. Every other student is one row.
"""

import itertools
import json
import re
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import Field

from maedistill.config.schema import Count, Section

TEACHER_SEED = 0
_UNFIT = re.compile(r"[^A-Za-z0-9_.+-]+")  # characters not allowed in a folder's name


class Recipe(Section):
    """A config file and `key=value` settings on top of it."""

    config: str
    set: tuple[str, ...] = ()


class TrainedNetwork(Section):
    """A network that is pre-trained (config, set), or starts from the pre-training of another one (init_from)."""

    config: str | None = None
    set: tuple[str, ...] = ()
    init_from: str | None = None
    finetune_set: tuple[str, ...] = ()

    def steps(self, name: str, seed: int) -> tuple[str | None, str | None]:
        """Return the names of its pre-training and fine-tuning, which are folders below OUT; None for a missing one."""
        start = name if self.config is not None else self.init_from
        pretrain = None if start is None else f"{start}/seed_{seed}/pretrain"
        return pretrain, f"{name}/seed_{seed}/finetune"


class Teacher(TrainedNetwork):
    """A network that is trained once. It is also fine-tuned if its own top-1 or logits are needed."""

    finetune: bool = False

    def steps(self, name: str, seed: int) -> tuple[str | None, str | None]:
        """Return what every network has, without a fine-tuning that the study does not ask for."""
        pretrain, finetune = super().steps(name, seed)
        return pretrain, finetune if self.finetune else None


class Student(TrainedNetwork):
    """A network that is trained with every seed, and always fine-tuned.

    One without pre-training has the architecture of another student (same_architecture_as) or the one that its
    fine-tuning sets.
    """

    same_architecture_as: str | None = None
    finetune_axes: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)

    def rows(self, name: str) -> list[tuple[str, "Student"]]:
        """Return (name, student without axes) for each combination of the values of its axes."""
        rows = []
        for values in itertools.product(*self.finetune_axes.values()):
            point = dict(zip(self.finetune_axes, values, strict=True))
            label = "".join(f"_{key.rpartition('.')[2]}_{_label(value)}" for key, value in point.items())
            settings = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in point.items()]
            changes = {"finetune_axes": {}, "finetune_set": (*self.finetune_set, *settings)}
            rows.append((name + label, self.model_copy(update=changes)))
        return rows


class Study(Section):
    """The whole study file. Once it is loaded, the paths of configs are relative to the working directory."""

    out: str
    seeds: tuple[Count, ...] = Field(min_length=1)
    baseline: str | None = None
    teachers: dict[str, Teacher] = Field(default_factory=dict)
    pretrain_set: tuple[str, ...] = ()
    finetune_set: tuple[str, ...] = ()
    students: dict[str, Student] = Field(min_length=1)
    finetune: Recipe
    lines: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = Field(default_factory=dict)

    def rows(self, only: Collection[str] | None = None) -> dict[str, Student]:
        """Return the students of the comparison by name of their row. only: names of students or rows; None for all."""
        rows = [(owner, *row) for owner, student in self.students.items() for row in student.rows(owner)]
        return {name: student for owner, name, student in rows if only is None or owner in only or name in only}

    def teacher_steps(self, *, finetuned_only: bool) -> dict[str, str]:
        """Return the teachers' pre-trainings and fine-tunings by placeholder."""
        found = dict[str, str | None]()
        for name, teacher in self.teachers.items():
            pretrain, finetune = teacher.steps(name, TEACHER_SEED)
            found[f"{{teacher.{name}}}"] = None if finetuned_only else pretrain
            found[f"{{teacher.{name}.finetuned}}"] = finetune
        return {placeholder: step for placeholder, step in found.items() if step is not None}


def _label(value: Any) -> str:
    """Format a value as part of a folder's name: `0.25`, `2-3`, `large.finetuned`."""
    if isinstance(value, list):
        return "-".join(map(_label, value))
    if isinstance(value, str):
        return _UNFIT.sub("-", value.replace("{teacher.", "")).strip("-.")
    return _UNFIT.sub("-", json.dumps(value))
