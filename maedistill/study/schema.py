"""The schema of a study file: teachers, students that learn from them in different ways, and seeds.

    out: runs/cifar10                          # relative to the working directory
    seeds: [0, 1, 2]
    baseline: mae                              # the row that the others are compared with; omitted: none
    teachers:                                  # each pre-trained once, with seed 0; omitted if no student needs one
      small: {config: teacher.yaml, set: [student.width=96]}
      large: {config: teacher.yaml, finetune: true}                  # and its own top-1
      early: {pretraining_of: large, finetune: true, finetune_set: [optim.epochs=1]}  # one epoch
    pretrain_set: [optim.epochs=50]            # for every student's pre-training, not for the teachers'
    finetune_set: [optim.ema=0.999]            # for every student's fine-tuning, not for the teachers'
    students:
      mae: {config: mae.yaml}                  # relative to this file
      dmae: {config: dmae.yaml, teacher: large, set: [align.weight=10], finetune_set: [optim.epochs=20]}
      sparse: {config: dmae.yaml, axes: {teacher: [small, large], masks: {student_keep_ratio: [0.1, 0.25]}}}
      tuned: {pretraining_of: dmae, finetune_axes: {optim: {lr: [1e-3, 2e-3]}}}
      kd: {shape_of: mae, finetune_set: [distill.logits.weight=1],      # an axis of lists: a list of lists
           finetune_axes: {distill: {teachers: [["{teacher.large.finetuned}"], ["{teacher.early.finetuned}"]]}}}
      scratch: {shape_of: mae}                 # not pre-trained; the network that `mae` is
      plain: {finetune_set: [student.model=vit_tiny_patch16_224]}    # not pre-trained; the network that is set
    finetune: {config: finetune.yaml, set: [optim.layer_decay=0.8]}

`set` holds `key=value` settings as on a command line, for pre-training; `finetune_set` is for fine-tuning; the `set` of
`finetune` applies to every fine-tuning. In these settings `{teacher.large}` stands for that teacher's run and
`{teacher.large.finetuned}` for its fine-tuned run: `"teacher.source={teacher.large}"`. A teacher may name teachers
above it. A student's `teacher: large` is short for this setting, and may be omitted if the file has one teacher. `axes`
map keys to lists of values: every combination is a separate row (`rows.py`), here
sparse_teacher_small_student_keep_ratio_0.1 and three more.
"""

from typing import Any

from pydantic import Field

from maedistill.config.schema import Count, Section

TEACHER_SEED = 0
OWN_KEYS = ("run", "seed", "init.source")  # reserved: the study sets them itself
Axes = dict[str, tuple[Any, ...]]  # dotted key, or "teacher" -> values; in the file the key's parts are nested


class Recipe(Section):
    """A config file and `key=value` settings on top of it."""

    config: str
    set: tuple[str, ...] = ()


class Teacher(Section):
    """A network that is pre-trained once (config, set), or reuses the pre-training of a teacher above it
    (pretraining_of). It is also fine-tuned if its own top-1 or logits are needed.
    """

    config: str | None = None
    set: tuple[str, ...] = ()
    pretraining_of: str | None = None
    finetune: bool = False
    finetune_set: tuple[str, ...] = ()


class Student(Section):
    """How a student starts, and its own settings of fine-tuning.

    It is pre-trained (config, set, teacher, axes), or reuses another student's pre-training (pretraining_of), or starts
    from scratch with the architecture of another student (shape_of) or the one that its fine-tuning sets.
    """

    config: str | None = None
    set: tuple[str, ...] = ()
    teacher: str | None = None
    axes: Axes = Field(default_factory=dict)
    pretraining_of: str | None = None
    shape_of: str | None = None
    finetune_set: tuple[str, ...] = ()
    finetune_axes: Axes = Field(default_factory=dict)


class Study(Section):
    """The whole study file. Once it is loaded, the paths of configs are relative to the working directory."""

    out: str
    seeds: tuple[Count, ...]
    baseline: str | None = None
    teachers: dict[str, Teacher] = Field(default_factory=dict)
    pretrain_set: tuple[str, ...] = ()
    finetune_set: tuple[str, ...] = ()
    students: dict[str, Student]
    finetune: Recipe
