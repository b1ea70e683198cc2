"""A grid file: several students pre-trained in different ways, to be fine-tuned alike, over seeds. YAML in, `Grid` out.

    out: runs/cifar10                          # relative to the working directory
    seeds: [0, 1, 2]
    teacher: {config: teacher.yaml}            # pre-trained once; left out where no student needs it
    finetune_teacher: true                     # its own top-1, for comparison
    pretrain_set: [optim.epochs=50]            # for every student's pre-training, not for the teacher's
    students:
      scratch: {shape_of: mae}                 # not pre-trained; the network that `mae` is
      mae: {config: mae.yaml}                  # relative to this file
      dmae: {config: dmae.yaml}                # methods with a teacher get teacher.source=run:OUT/teacher
      dmae_10: {config: dmae.yaml, set: [align.weight=10], finetune_set: [optim.epochs=20]}
    finetune: {config: finetune.yaml, set: [optim.layer_decay=0.8]}

`set` holds `key=value` as on a command line: a student's and the teacher's are for pre-training, that of `finetune` for
everybody's fine-tuning; `finetune_set` is for one student's.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from maedistill.config.document import Refusal, read_document, read_text
from maedistill.config.schema import Count, Section
from maedistill.errors import ConfigError

TEACHER, TEACHER_FINETUNE = "teacher", "teacher_finetune"
OWN_KEYS = ("run", "seed", "init.source")  # the grid sets them itself
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TAKEN = (TEACHER, TEACHER_FINETUNE, "logs")  # folders of OUT
_EXAMPLE = "configs/cifar10/grid.yaml shows how it is written"


class Recipe(Section):
    """A config file and `key=value` settings on top of it."""

    config: str
    set: tuple[str, ...] = ()


class Student(Section):
    """How a student is pre-trained (config, set) or, where it is not, which student's network it has (shape_of)."""

    config: str | None = None
    set: tuple[str, ...] = ()
    shape_of: str | None = None
    finetune_set: tuple[str, ...] = ()


class Grid(Section):
    """The whole file. The paths of configs are relative to the working directory once it is loaded."""

    out: str
    seeds: tuple[Count, ...]
    teacher: Recipe | None = None
    finetune_teacher: bool = False
    pretrain_set: tuple[str, ...] = ()
    students: dict[str, Student]
    finetune: Recipe


def load_grid(path: str | Path) -> Grid:
    """Reads a grid file. Raises ConfigError, which names the first problem with its line."""
    path = Path(path)
    try:
        leaves = read_document(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        remedy = "name a YAML file, e.g. configs/cifar10/grid.yaml"
        raise ConfigError(f"the grid {path} cannot be read: {error}", remedy) from None
    except Refusal as error:
        raise ConfigError(f"{path}:{error.line}: {error.cause}", error.remedy) from None
    try:
        grid = Grid.model_validate_json(json.dumps(_tree({name: value for name, (value, _) in leaves.items()})))
        problem = next(_problems(grid), None)
    except ValidationError as error:
        problem = _invalid(error)
    if problem is not None:
        name, cause, remedy = problem
        raise ConfigError(f"{path}:{_line(name, leaves)} {name}: {cause}", remedy)
    return _from_here(grid, path.parent)


def require_free(text: str) -> str | None:
    """Why the `key=value` cannot be given to runs of a grid; None where it can."""
    key = text.partition("=")[0]
    return f"the grid sets {key} itself" if key in OWN_KEYS else None


def _problems(grid: Grid) -> Iterator[tuple[str, str, str]]:
    """(key, cause, remedy) of what the schema cannot see."""
    if not grid.seeds or len(set(grid.seeds)) != len(grid.seeds):
        yield "seeds", f"{list(grid.seeds)} is not a list of different seeds", "write e.g. [0, 1, 2]"
    if not grid.students:
        yield "students", "there are none", _EXAMPLE
    if grid.finetune_teacher and grid.teacher is None:
        yield "finetune_teacher", "there is no teacher to fine-tune", "add one, or remove this"
    for name, student in grid.students.items():
        yield from _student_problems(name, student, grid)
    recipes = {"teacher.set": grid.teacher.set if grid.teacher else (), "finetune.set": grid.finetune.set}
    recipes["pretrain_set"] = grid.pretrain_set
    for name, student in grid.students.items():
        recipes |= {f"students.{name}.set": student.set, f"students.{name}.finetune_set": student.finetune_set}
    for key, texts in recipes.items():
        for cause in filter(None, map(require_free, texts)):
            yield key, cause, "remove it"


def _student_problems(name: str, student: Student, grid: Grid) -> Iterator[tuple[str, str, str]]:
    key = f"students.{name}"
    if not _NAME.fullmatch(name) or name in _TAKEN:
        remedy = f"use letters, digits, - and _, and none of {', '.join(_TAKEN)}"
        yield key, f"{name} cannot name a student's folder", remedy
    if (student.config is None) == (student.shape_of is None):
        remedy = "a pre-trained student is {config: FILE}, one from scratch {shape_of: STUDENT}"
        yield key, "a student has a config or a shape_of", remedy
    elif student.shape_of is not None:
        trained = [other for other, entry in grid.students.items() if entry.config is not None]
        if student.shape_of not in trained:
            yield (
                f"{key}.shape_of",
                f"{student.shape_of} is no pre-trained student",
                f"use {' or '.join(trained) or 'one'}",
            )
        if student.set:
            yield f"{key}.set", "it is for pre-training, and this student starts from scratch", "use finetune_set"


def _invalid(error: ValidationError) -> tuple[str, str, str]:
    """(key, cause, remedy) of the first thing that the schema refuses."""
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # a typo also leaves a key missing
    parts = [str(part) for part in first["loc"]]
    name, section = ".".join(parts), (parts[0] if len(parts) > 1 else "")
    fields = {"students": Student, "teacher": Recipe, "finetune": Recipe}.get(section, Grid).model_fields
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(parts[-1], fields, n=1)
        return name, "there is no such key", f"did you mean {near[0]}?" if near else f"keys are {', '.join(fields)}"
    if first["type"] == "missing":
        return name, "it is missing", _EXAMPLE
    message = first["msg"]
    return name, message[0].lower() + message[1:], _EXAMPLE


def _line(name: str, leaves: Mapping[str, tuple[Any, int]]) -> int:
    """The line of the key, of what is below it, or of what it is below."""
    for key, (_, line) in leaves.items():
        if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
            return line
    return _line(name.rpartition(".")[0], leaves) if "." in name else 1


def _tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as dicts within dicts."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *sections, leaf = name.split(".")
        below = tree
        for section in sections:
            below = below.setdefault(section, {})
        below[leaf] = value
    return tree


def _from_here(grid: Grid, folder: Path) -> Grid:
    """The grid with its config paths relative to the working directory instead of the file's folder, and with what is
    set for every student set for each.
    """

    def moved(recipe: Any) -> Any:
        if recipe is None or recipe.config is None:
            return recipe
        return recipe.model_copy(update={"config": os.path.normpath(folder / recipe.config)})

    def with_common(student: Student) -> Student:
        return student.model_copy(update={"set": (*grid.pretrain_set, *student.set)}) if student.config else student

    students = {name: with_common(moved(student)) for name, student in grid.students.items()}
    changes = {"teacher": moved(grid.teacher), "finetune": moved(grid.finetune), "students": students}
    return grid.model_copy(update=changes)
