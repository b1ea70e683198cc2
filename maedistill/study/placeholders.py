"""Replace `{teacher.large}` and `{teacher.large.finetuned}` in a `key=value` by the runs of the study's teachers.

    "distill.teachers=[{teacher.large.finetuned}]"  ->  distill.teachers=[run:OUT/large/seed_0/finetune]

Every run of a study has a name, which is its folder below OUT: NAME/seed_K/pretrain and NAME/seed_K/finetune.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from maedistill.study.schema import TEACHER_SEED, Teacher

_PLACEHOLDER = re.compile(r"\{teacher\.([^{}]*)\}")
_FINETUNED = ".finetuned"


def pretrain_step(name: str, seed: int) -> str:
    """Return the name of a teacher's or student's pre-training."""
    return f"{name}/seed_{seed}/pretrain"


def finetune_step(name: str, seed: int) -> str:
    """Return the name of a teacher's or student's fine-tuning."""
    return f"{name}/seed_{seed}/finetune"


def teacher_of(name: str) -> str:
    """Return the placeholder of a teacher's pre-training."""
    return f"{{teacher.{name}}}"


def fill(text: str, out: Path) -> str:
    """Return the text with each placeholder replaced by the folder of its run."""
    return _PLACEHOLDER.sub(lambda found: f"run:{out / _step(found[1])}", text)


def steps_named(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the runs that the placeholders in the texts stand for, each once."""
    return tuple(dict.fromkeys(_step(found) for text in texts for found in _PLACEHOLDER.findall(text)))


def wrong_placeholder(text: str, teachers: Mapping[str, Teacher]) -> tuple[str, str] | None:
    """Return (cause, remedy) for the first placeholder that these teachers do not satisfy; None if all are valid."""
    for found in _PLACEHOLDER.findall(text):
        name = found.removesuffix(_FINETUNED)
        if name not in teachers:
            remedy = f"use {' or '.join(map(teacher_of, teachers))}" if teachers else "a teacher must stand above it"
            return f"{teacher_of(found)} names no teacher that can be used here", remedy
        if found.endswith(_FINETUNED) and not teachers[name].finetune:
            return f"{teacher_of(found)}: that teacher is not fine-tuned", f"add finetune: true to teachers.{name}"
        origin = teachers[name].pretraining_of
        if origin is not None and not found.endswith(_FINETUNED):
            cause = f"{teacher_of(found)}: that teacher's pre-training is {teacher_of(origin)}"
            return cause, f"use that, or {teacher_of(name + _FINETUNED)}"
    return None


def _step(found: str) -> str:
    name = found.removesuffix(_FINETUNED)
    return (finetune_step if found.endswith(_FINETUNED) else pretrain_step)(name, TEACHER_SEED)
