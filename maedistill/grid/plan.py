"""From a grid to commands: which runs there are, in which order, and what each of them needs.

    Grid, seeds, settings -> [Step, ...]     OUT/teacher -> OUT/STUDENT/seed_K/pretrain -> OUT/STUDENT/seed_K/finetune
                                             OUT/teacher_finetune

A step's name is its run folder below OUT. Each step is a command that also works alone, on a config that was loaded
here: what is wrong with any of them is said before the first one starts.
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
from maedistill.grid.file import TEACHER, TEACHER_FINETUNE, Grid, Recipe, require_free
from maedistill.grid.steps import Step

TEST_FILE = "test.json"
_SHAPE = ("model", "width", "depth", "heads", "patch_size", "class_token", "register_tokens")


def pretrain_step(student: str, seed: int) -> str:
    """The name of a student's pre-training."""
    return f"{student}/seed_{seed}/pretrain"


def finetune_step(student: str, seed: int) -> str:
    """The name of a student's fine-tuning."""
    return f"{student}/seed_{seed}/finetune"


@dataclass(frozen=True)
class GridPlan:
    """What the commands of a grid follow from.

    only: names of students, or `teacher`; None: all. settings: `key=value` for every run that has the key.
    is_done: whether the run of a config is finished in its folder; raises ConfigError where another one is there.
    """

    grid: Grid
    out: Path
    seeds: Sequence[int]
    only: Sequence[str] | None
    settings: Sequence[str]
    is_done: Callable[[RunConfig], bool]

    def steps(self) -> list[Step]:
        """All steps, seed by seed, so that a grid that is not finished is a comparison; the teacher's top-1 comes last.

        Raises ConfigError for a setting or a config that cannot be run.
        """
        self._require_known()
        grid, steps = self.grid, list[Step]()
        for seed in self.seeds:
            for name in grid.students:
                if self.only is None or name in self.only:
                    steps += self._student(name, seed)
        asked = self.only is None or TEACHER in self.only
        if grid.teacher is not None and (asked or any(TEACHER in step.needs for step in steps)):
            steps.insert(0, self._pretrain(TEACHER, grid.teacher, seed=0))
            if grid.finetune_teacher and asked:
                steps.append(self._finetune(TEACHER_FINETUNE, (), seed=0, start=TEACHER))
        return steps

    def _student(self, name: str, seed: int) -> list[Step]:
        student = self.grid.students[name]
        first, second = pretrain_step(name, seed), finetune_step(name, seed)
        if student.config is None:
            return [self._finetune(second, student.finetune_set, seed=seed, shape_of=student.shape_of)]
        recipe = Recipe(config=student.config, set=student.set)
        pretraining = self._pretrain(first, recipe, seed=seed)
        return [pretraining, self._finetune(second, student.finetune_set, seed=seed, start=first)]

    def _pretrain(self, name: str, recipe: Recipe, *, seed: int) -> Step:
        """A student's config names a teacher of its own, so that it also runs alone. The grid's takes its place, but
        not that of one which is set.
        """
        settings = [*recipe.set, *self._settings_of(PretrainConfig)]
        own = [f"run={self.out / name}", f"seed={seed}"]
        ours = f"run:{self.out / TEACHER}"
        config = _load(name, recipe.config, [*settings, *own], PretrainConfig)
        is_set = any(text.startswith("teacher.source=") for text in settings)
        if config.method != "mae" and self.grid.teacher is not None and not is_set:
            own.append(f"teacher.source={ours}")
            config = _load(name, recipe.config, [*settings, *own], PretrainConfig)
        needs = (TEACHER,) if config.teacher.source == ours else ()
        command = ("tools/pretrain.py", recipe.config, *settings, *own)
        return Step(name, command, needs, partial(self.is_done, config))

    def _finetune(
        self, name: str, more: Sequence[str], *, seed: int, start: str | None = None, shape_of: str | None = None
    ) -> Step:
        """start: the step whose run it starts from. shape_of: from scratch, the student whose network it has."""
        recipe = self.grid.finetune
        settings = [*recipe.set, *more, *self._settings_of(FinetuneConfig)]
        own = [f"run={self.out / name}", f"seed={seed}"]
        if start is not None:
            own.append(f"init.source=run:{self.out / start}")
        else:
            shape, normalisation = self._network_of(shape_of)
            settings = [*shape, *settings]
            config = _load(name, recipe.config, [*settings, *own], FinetuneConfig)
            if config.data.mean is None:  # what the others take from the weights that they start from
                settings = [*normalisation, *settings]
        config = _load(name, recipe.config, [*settings, *own], FinetuneConfig)
        command = ("tools/finetune.py", recipe.config, *settings, *own)
        return Step(name, command, () if start is None else (start,), partial(self.is_done, config))

    def _network_of(self, student: str) -> tuple[list[str], list[str]]:
        """Settings of fine-tuning that give a network from scratch this student's shape, and its normalisation."""
        entry = self.grid.students[student]
        settings = [*entry.set, *self._settings_of(PretrainConfig)]
        config = _load(student, entry.config, settings, PretrainConfig, to_run=False)
        shape = {key: getattr(config.student, key) for key in _SHAPE}
        normalisation = {"mean": list(config.data.mean), "std": list(config.data.std)}
        return (
            [
                f"student.{key}={value if key == 'model' else json.dumps(value)}"
                for key, value in shape.items()
                if value is not None
            ],
            [f"data.{key}={json.dumps(value)}" for key, value in normalisation.items()],
        )

    def _settings_of(self, root: type[RunConfig]) -> list[str]:
        """Those settings whose key the stage has."""
        known = {*all_keys(root=root), *all_sections(root=root)}
        return [text for text in self.settings if text.partition("=")[0] in known]

    def _require_known(self) -> None:
        used = {*self._settings_of(PretrainConfig), *self._settings_of(FinetuneConfig)}
        for text in self.settings:
            if cause := require_free(text):
                raise ConfigError(f"command line {text}: {cause}", "leave it out")
            if text not in used:
                problem = unknown_key(text.partition("=")[0], root=PretrainConfig)
                raise ConfigError(f"command line {text}: {problem.cause}", problem.remedy)
        names = [*self.grid.students, *([TEACHER] if self.grid.teacher is not None else [])]
        for name in self.only or ():
            if name not in names:
                raise ConfigError(f"--only {name}: there is no such student in the grid", f"it has {', '.join(names)}")


def add_tests(steps: Sequence[Step], out: Path, shards: str, is_scored: Callable[[Path, str], bool]) -> list[Step]:
    """The steps, and after each fine-tuning one that evaluates it on `shards`, to TEST_FILE in the run's folder."""
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
