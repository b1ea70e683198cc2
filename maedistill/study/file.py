"""Load a study file into a validated `Study`; errors name the line. `schema.py` documents the file format.

YAML -> leaves (dotted name -> value, line) -> schema -> rules between keys -> Study
"""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from maedistill.config.document import config_name, find_config, read_file
from maedistill.config.keys import nested
from maedistill.config.schema import Section
from maedistill.config.shared_rules import Problem
from maedistill.errors import ConfigError, join_first
from maedistill.study.schema import Recipe, Student, Study, Teacher

MOST_RUNS = 300  # of one start; more is likely a typo, or should be several studies
_EXAMPLE = "cifar10/study_methods shows how it is written"
_FOLDER = re.compile(r"(?!logs$)[A-Za-z0-9][A-Za-z0-9_.+-]{0,119}")  # OUT/logs holds the logs
_STARTS = ("config", "init_from", "same_architecture_as")


def load_study(path: str | Path) -> Study:
    """Read a study file. Raises ConfigError, which names the first problem and its line."""
    path = find_config(path)
    try:
        leaves = read_file(path)
    except (OSError, UnicodeDecodeError) as error:
        remedy = "name a YAML file, e.g. cifar10/study_methods"
        raise ConfigError(f"the study {path} cannot be read: {error}", remedy) from None
    values = {name: value for name, (value, _) in leaves.items()}
    configs = {name: value for name, value in values.items() if name.endswith(".config") and isinstance(value, str)}
    values |= {name: config_name(find_config(value, beside=path)) for name, value in configs.items()}
    try:
        study = Study.model_validate_json(json.dumps(nested(values, _parts)))
        problem = next(_problems(study), None)
    except ValidationError as error:
        problem = _schema_problem(error)
    if problem is not None:
        raise ConfigError(f"{path}:{_line(problem.key, leaves)} {problem.key}: {problem.cause}", problem.remedy)
    return study


def _parts(name: str) -> list[str]:
    """Split a leaf's dotted name. In students.NAME.finetune_axes.KEY, KEY is a dotted config key: one part."""
    parts = name.split(".")
    return name.split(".", 3) if parts[0] == "students" and parts[2:3] == ["finetune_axes"] else parts


def _line(name: str, leaves: Mapping[str, tuple[Any, int]]) -> int:
    """Return the line of the key, of a key below it, or of its nearest parent."""
    while name:
        for key, (_, line) in leaves.items():
            if f"{key}.".startswith(f"{name}."):
                return line
        name = name.rpartition(".")[0]
    return 1


def _schema_problem(error: ValidationError) -> Problem:
    """Return the first problem that the schema reports."""
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # a typo also leaves a key missing
    parts = [str(part) for part in first["loc"]]
    name, section = ".".join(parts), (parts[0] if len(parts) > 1 else "")
    schemas: dict[str, type[Section]] = {"students": Student, "teachers": Teacher, "finetune": Recipe}
    fields = schemas.get(section, Study).model_fields
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(parts[-1], fields, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"keys are {', '.join(fields)}"
        return Problem(name, "unknown key", remedy)
    return Problem(name, first["msg"][0].lower() + first["msg"][1:], _EXAMPLE)


def _problems(study: Study) -> Iterator[Problem]:
    """Yield every problem between the keys of a study. Rows are only expanded if there are at most MOST_RUNS."""
    if len(set(study.seeds)) != len(study.seeds):
        yield Problem("seeds", f"{list(study.seeds)} is not a list of different seeds", "write e.g. [0, 1, 2]")
    yield from _start_problems("teacher", study.teachers)
    yield from _start_problems("student", study.students)
    count = sum(math.prod(map(len, student.finetune_axes.values())) for student in study.students.values())
    if count > MOST_RUNS:
        remedy = "give the axes fewer values, or make two studies"
        yield Problem("students", f"they are {count:,} rows, more than {MOST_RUNS}", remedy)
        return
    folders = [(f"teachers.{name}", name) for name in study.teachers]
    for owner, student in study.students.items():
        folders += [(f"students.{owner}", name) for name, _ in student.rows(owner)]
    names = Counter(name for _, name in folders)
    for key, name in folders:
        if not _FOLDER.fullmatch(name):
            cause = f"{name[:40]} cannot name a folder of runs"
            remedy = "use at most 120 letters, digits, - and _, the first one a letter or digit, and not logs"
            yield Problem(key, cause, remedy)
        if names[name] > 1:
            yield Problem(key, f"two networks would be named {name}", "give one of them another name")
    named = [("baseline", study.baseline)] if study.baseline is not None else []
    named += [(f"lines.{line}", row) for line, joined in study.lines.items() for row in joined]
    rows = study.rows()
    for key, row in named:
        if row not in rows:
            yield Problem(key, f"{row} is not a row", f"rows are {join_first(rows)}")


def _start_problems(kind: str, networks: Mapping[str, Teacher | Student]) -> Iterator[Problem]:
    """Check that each network starts in one way, and from a network that is pre-trained."""
    pretrained = [name for name, network in networks.items() if network.config is not None]
    for name, network in networks.items():
        key = f"{kind}s.{name}"
        starts = {start: other for start in _STARTS if (other := getattr(network, start, None)) is not None}
        if len(starts) > 1:
            yield Problem(key, f"it has both {' and '.join(starts)}", "keep one of them")
        if kind == "teacher" and not starts:
            yield Problem(key, "it has neither config nor init_from", "add one of them")
        if isinstance(network, Teacher) and network.init_from is not None and not network.finetune:
            yield Problem(f"{key}.init_from", "without fine-tuning it is the same network", "add finetune: true")
        if isinstance(network, Teacher) and network.finetune_set and not network.finetune:
            yield Problem(f"{key}.finetune_set", "this teacher is not fine-tuned", "add finetune: true, or remove it")
        if network.set and network.config is None:
            cause = f"it is for pre-training, and this {kind} has none of its own"
            yield Problem(f"{key}.set", cause, "use finetune_set")
        if network.config is not None and getattr(network, "finetune_axes", None):
            remedy = "pre-train another student and name it: init_from"
            yield Problem(f"{key}.finetune_axes", "they are for students without a pre-training of their own", remedy)
        for start, other in starts.items():
            if start != "config" and other not in pretrained:
                remedy = f"use {join_first(pretrained)}" if pretrained else f"give a {kind} a config"
                yield Problem(f"{key}.{start}", f"there is no pre-trained {kind} {other}", remedy)
