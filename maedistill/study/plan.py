"""Plan the commands of a study: which runs there are, in which order, and which runs each of them needs.

    Study, seeds, settings -> [Step, ...]     OUT/TEACHER/seed_0/pretrain -> OUT/STUDENT/seed_K/pretrain -> .../finetune
                                              OUT/TEACHER/seed_0/finetune

A step's name is its run folder below OUT. Each step is a command that also works on its own. All configs are loaded
while planning, so that errors in any of them are reported before the first step starts.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import all_keys, all_sections
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.schema import RunConfig
from maedistill.config.values import unknown_key
from maedistill.errors import ConfigError
from maedistill.study.placeholders import fill, finetune_step, pretrain_step, steps_named, teacher_of, wrong_placeholder
from maedistill.study.rows import Pretraining, Row, all_pretrainings, all_rows
from maedistill.study.rules import MOST_RUNS, offered, reserved_key_error
from maedistill.study.schema import TEACHER_SEED, Study
from maedistill.study.steps import Step

TEST_FILE = "test.json"
_SHAPE = ("model", "width", "depth", "num_heads", "patch_size", "class_token", "register_tokens")
_SOURCE = "teacher.source"


@dataclass(frozen=True)
class StudyPlan:
    """The inputs that determine the commands of a study.

    only: names of students, rows or teachers; None for all. settings: `key=value` for every run that has the key.
    is_done: returns whether the run of a config is finished in its folder; raises UserError if the run can neither be
    used nor started.
    """

    study: Study
    out: Path
    seeds: Sequence[int]
    only: Sequence[str] | None
    settings: Sequence[str]
    is_done: Callable[[RunConfig], bool]

    def steps(self) -> list[Step]:
        """Return all steps in order: required teachers, students seed by seed, then chosen teachers that no step needs.

        Seed by seed, so that the rows of an unfinished study can already be compared. Raises ConfigError for settings
        or configs that cannot be run, and for more than MOST_RUNS runs.
        """
        rows, trained = all_rows(self.study.students), dict(all_pretrainings(self.study.students))
        self._require_known(rows)
        chosen = [(name, row) for name, row in rows if self._asked(name, row.student)]
        self._require_few(chosen)
        students: dict[str, Step] = {}
        for seed in self.seeds:
            for name, row in chosen:
                start = pretrain_step(row.pretraining, seed) if row.pretraining is not None else None
                if start is not None and start not in students:
                    students[start] = self._pretrain(start, trained[row.pretraining], seed=seed)
                last = finetune_step(name, seed)
                students[last] = self._finetune(last, self._row_settings(row, trained), seed=seed, start=start)
        needed, others = self._teachers({need for step in students.values() for need in step.needs})
        return [*needed, *students.values(), *others]

    def _teachers(self, wanted: set[str]) -> tuple[list[Step], list[Step]]:
        """Return the teachers' steps that another step needs, and the other chosen ones, each in the file's order."""
        needed, others = list[Step](), list[Step]()
        for name, teacher in reversed(self.study.teachers.items()):  # a teacher only needs teachers above it
            start, last = pretrain_step(teacher.pretraining_of or name, TEACHER_SEED), finetune_step(name, TEACHER_SEED)
            for step in (*([last] if teacher.finetune else []), *([start] if teacher.config is not None else [])):
                if step not in wanted and not self._asked(name):
                    continue
                if step == last:
                    made = self._finetune(step, teacher.finetune_set, seed=TEACHER_SEED, start=start)
                else:
                    way = Pretraining(name, teacher.config, teacher.set, teacher=None)
                    made = self._pretrain(step, way, seed=TEACHER_SEED)
                (needed if step in wanted else others).insert(0, made)
                wanted |= set(made.needs)
        return needed, others

    def _pretrain(self, name: str, way: Pretraining, *, seed: int) -> Step:
        config, settings, needs = self._load_pretraining(name, way, run=(f"run={self.out / name}", f"seed={seed}"))
        return Step(name, ("tools/pretrain.py", way.config, *settings), needs, partial(self.is_done, config))

    def _load_pretraining(
        self, name: str, way: Pretraining, *, run: Sequence[str] = ()
    ) -> tuple[PretrainConfig, list[str], tuple[str, ...]]:
        """Return the config of a pre-training, its settings and the names of the steps that it needs.

        A student's config may name its own teacher, so that it also runs alone. The study's teacher replaces that one,
        but not a teacher that the student's `set` or the command line names.
        """
        given = self._settings_of(PretrainConfig)
        texts = [*way.set, *given, *run]
        set_by_hand = any(text.startswith(f"{_SOURCE}=") for text in texts)
        teacher = way.teacher
        if way.teacher is None and way.owner in self.study.students and not set_by_hand:
            config = _load(name, way.config, self._filled(texts), PretrainConfig, to_run=bool(run))
            teacher = self._default_teacher(name, config.method)
        if teacher is not None and not any(text.startswith(f"{_SOURCE}=") for text in given):
            texts.append(f"{_SOURCE}={teacher_of(teacher)}")
        settings = self._filled(texts)
        config = _load(name, way.config, settings, PretrainConfig, to_run=bool(run))
        return config, settings, steps_named(texts)

    def _default_teacher(self, name: str, method: str) -> str | None:
        """Return the study's only teacher, for a student that names none; None if method or study has no teacher."""
        teachers = [one for one, teacher in self.study.teachers.items() if teacher.config is not None]
        if method == "mae" or not teachers:
            return None
        if len(teachers) > 1:
            cause = f"{name}: the study has {len(teachers)} teachers, and the student does not say which is its"
            raise ConfigError(cause, f"add teacher: {' or '.join(teachers)}, or set {_SOURCE}")
        return teachers[0]

    def _row_settings(self, row: Row, trained: dict[str, Pretraining]) -> list[str]:
        """Return a row's settings of fine-tuning. One from scratch may copy the architecture of another student."""
        return [*(self._network_of(row.shape_of, trained) if row.shape_of is not None else ()), *row.finetune_set]

    def _network_of(self, name: str, trained: dict[str, Pretraining]) -> list[str]:
        """Return settings of fine-tuning that give a network from scratch this student's architecture, and its images
        the same normalisation, unless fine-tuning sets its own.
        """
        config, _, _ = self._load_pretraining(name, trained[name])
        shape = {f"student.{key}": getattr(config.student, key) for key in _SHAPE}
        settings = [f"{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in shape.items() if v is not None]
        recipe = self.study.finetune
        common = [*recipe.set, *settings, *self._settings_of(FinetuneConfig)]
        if _load(name, recipe.config, common, FinetuneConfig, to_run=False).data.mean is not None:
            return settings
        normalisation = {"mean": list(config.data.mean), "std": list(config.data.std)}
        return [*settings, *(f"data.{key}={json.dumps(value)}" for key, value in normalisation.items())]

    def _finetune(self, name: str, more: Sequence[str], *, seed: int, start: str | None) -> Step:
        """Plan a fine-tuning. start: the step whose run it starts from; None from scratch."""
        recipe = self.study.finetune
        texts = [*recipe.set, *more, *self._settings_of(FinetuneConfig), f"run={self.out / name}", f"seed={seed}"]
        if start is not None:
            texts.append(f"init.source=run:{self.out / start}")
        settings = self._filled(texts)
        config = _load(name, recipe.config, settings, FinetuneConfig)
        self._require_classifiers(name, config, steps_named(texts))
        needs = (*(() if start is None else (start,)), *steps_named(texts))
        return Step(name, ("tools/finetune.py", recipe.config, *settings), needs, partial(self.is_done, config))

    def _require_classifiers(self, name: str, config: FinetuneConfig, named: Sequence[str]) -> None:
        """Raise ConfigError if logits are distilled from a teacher that is only pre-trained and so has no classifier.

        Checked while planning, because the run itself would fail only after its teacher has been trained.
        """
        encoders = [step for step in named if step.endswith("/pretrain")]
        encoders = [step for step in encoders if f"run:{self.out / step}" in config.distill.teachers]
        if config.distill.logit_terms and encoders:
            teacher = encoders[0].partition("/")[0]
            raise ConfigError(
                f"{name}: {teacher_of(teacher)} is pre-trained only, and distill.{config.distill.logit_terms[0]} "
                "compares predictions",
                f"name {teacher_of(f'{teacher}.finetuned')}, with finetune: true, or use terms on features",
            )

    def _filled(self, texts: Sequence[str]) -> list[str]:
        return [fill(text, self.out) for text in texts]

    def _settings_of(self, root: type[RunConfig]) -> list[str]:
        """Return the settings whose key the stage has."""
        known = {*all_keys(root=root), *all_sections(root=root)}
        return [text for text in self.settings if text.partition("=")[0] in known]

    def _asked(self, *names: str) -> bool:
        return self.only is None or any(name in self.only for name in names)

    def _require_known(self, rows: Sequence[tuple[str, Row]]) -> None:
        used = {*self._settings_of(PretrainConfig), *self._settings_of(FinetuneConfig)}
        for text in self.settings:
            if cause := reserved_key_error(text):
                raise ConfigError(f"command line {text}: {cause}", "leave it out")
            if wrong := wrong_placeholder(text, {}):
                raise ConfigError(f"command line {text}: {wrong[0]}", "write it in the study file")
            if text not in used:
                problem = unknown_key(text.partition("=")[0], root=PretrainConfig)
                raise ConfigError(f"command line {text}: {problem.cause}", problem.remedy)
        names = list(dict.fromkeys([*self.study.students, *self.study.teachers, *(name for name, _ in rows)]))
        for name in self.only or ():
            if name not in names:
                raise ConfigError(f"--only {name}: the study has nobody of that name", f"it has {offered(names)}")

    def _require_few(self, chosen: Sequence[tuple[str, Row]]) -> None:
        """Raise ConfigError for more than MOST_RUNS runs of students, before their configs are loaded."""
        each = len(chosen) + len({row.pretraining for _, row in chosen} - {None})
        if each * len(self.seeds) > MOST_RUNS:
            raise ConfigError(
                f"{len(chosen)} rows with {len(self.seeds)} seeds are {each * len(self.seeds):,} runs, more than "
                f"{MOST_RUNS}",
                "give the axes fewer values, or take some at a time with --only and --seeds",
            )


def add_tests(steps: Sequence[Step], out: Path, shards: str, is_scored: Callable[[Path, str], bool]) -> list[Step]:
    """Add a step after each fine-tuning that evaluates it on `shards` and writes TEST_FILE in the run's folder."""
    found = []
    for step in steps:
        found.append(step)
        if step.command[0] == "tools/finetune.py":
            run = out / step.name
            command = ("tools/evaluate.py", str(run), shards, "--no-latency", "--json", str(run / TEST_FILE))
            found.append(Step(f"{step.name}/test", command, (step.name,), partial(is_scored, run / TEST_FILE, shards)))
    return found


def _load(name: str, path: str, settings: Sequence[str], root: type[RunConfig], *, to_run: bool = True) -> Any:
    try:
        return load_config(path, settings, root=root, to_run=to_run).config
    except ConfigError as error:
        raise ConfigError(f"{name}: {error.cause}", error.remedy) from None
