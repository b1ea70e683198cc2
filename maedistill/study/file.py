"""Load a study file into a validated `Study`; errors name the line. `schema.py` documents the file format.

YAML -> leaves (dotted name -> value, line) -> schema -> rules -> Study, with paths relative to the working directory
"""

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from maedistill.config.document import Refusal, read_document, read_text
from maedistill.config.keys import nested
from maedistill.errors import ConfigError
from maedistill.study.rules import Problem, problems
from maedistill.study.schema import Recipe, Student, Study, Teacher

_EXAMPLE = "configs/cifar10/study_methods.yaml shows how it is written"
_AXES = ("axes", "finetune_axes")


def load_study(path: str | Path) -> Study:
    """Read a study file. Raises ConfigError, which names the first problem and its line."""
    path = Path(path)
    try:
        leaves = read_document(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        remedy = "name a YAML file, e.g. configs/cifar10/study_methods.yaml"
        raise ConfigError(f"the study {path} cannot be read: {error}", remedy) from None
    except Refusal as error:
        raise ConfigError(f"{path}:{error.line}: {error.cause}", error.remedy) from None
    try:
        values = {name: value for name, (value, _) in leaves.items()}
        study = Study.model_validate_json(json.dumps(nested(values, parts=_parts)))
        problem = next(problems(study), None)
    except ValidationError as error:
        problem = _invalid(error)
    if problem is not None:
        name, cause, remedy = problem
        raise ConfigError(f"{path}:{_line(name, leaves)} {name}: {cause}", remedy)
    return _from_here(study, path.parent)


def _invalid(error: ValidationError) -> Problem:
    """Return the first problem that the schema reports."""
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # a typo also leaves a key missing
    parts = [str(part) for part in first["loc"]]
    name, section = ".".join(parts), (parts[0] if len(parts) > 1 else "")
    fields = {"students": Student, "teachers": Teacher, "finetune": Recipe}.get(section, Study).model_fields
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(parts[-1], fields, n=1)
        return name, "there is no such key", f"did you mean {near[0]}?" if near else f"keys are {', '.join(fields)}"
    if first["type"] == "missing":
        return name, "it is missing", _EXAMPLE
    message = first["msg"]
    return name, message[0].lower() + message[1:], _EXAMPLE


def _line(name: str, leaves: Mapping[str, tuple[Any, int]]) -> int:
    """Return the line of the key, of a key below it, or of its nearest parent."""
    for key, (_, line) in leaves.items():
        if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
            return line
    return _line(name.rpartition(".")[0], leaves) if "." in name else 1


def _parts(name: str) -> list[str]:
    """Split a leaf's dotted name. A key of axes, as in students.NAME.axes.KEY, is a dotted config key: one part."""
    parts = name.split(".")
    is_axis = parts[0] == "students" and len(parts) > 3 and parts[2] in _AXES
    return name.split(".", 3) if is_axis else parts


def _from_here(study: Study, folder: Path) -> Study:
    """Return the study with config paths relative to the working directory instead of the file's folder, and with the
    settings common to all students added to each student's own.
    """

    def moved(recipe: Any) -> Any:
        if recipe.config is None:
            return recipe
        return recipe.model_copy(update={"config": os.path.normpath(folder / recipe.config)})

    def with_common(student: Student) -> Student:
        common = {"finetune_set": (*study.finetune_set, *student.finetune_set)}
        if student.config is not None:
            common["set"] = (*study.pretrain_set, *student.set)
        return student.model_copy(update=common)

    changes = {
        "teachers": {name: moved(teacher) for name, teacher in study.teachers.items()},
        "students": {name: with_common(moved(student)) for name, student in study.students.items()},
        "finetune": moved(study.finetune),
    }
    return study.model_copy(update=changes)
