"""Plan the commands of a study: which runs there are, in which order, and which runs each of them needs.

    Study, seeds, settings -> [Step, ...]     OUT/TEACHER/seed_0/pretrain -> OUT/STUDENT/seed_K/pretrain -> .../finetune
                                              OUT/TEACHER/seed_0/finetune

A step's name is its run folder below OUT. Each step is a command that also works on its own. All configs are loaded
while planning, so that errors in any of them are reported before the first step starts.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import all_keys, all_sections
from maedistill.config.loader import load_config, read_setting
from maedistill.config.pretrain import UNUSED_SECTIONS, PretrainConfig
from maedistill.config.schema import SHAPE, RunConfig
from maedistill.config.sources import EMA
from maedistill.config.values import STAGES, Root, unknown_key
from maedistill.data.shards.scan import Members
from maedistill.errors import ConfigError, join_first
from maedistill.study.completion import is_done, is_scored
from maedistill.study.file import MOST_RUNS
from maedistill.study.runner import Step
from maedistill.study.schema import TEACHER_SEED, Student, Study, Teacher

TEST_FILE = "test.json"
_RESERVED_KEYS = ("run", "seed", "init.source")  # the study sets them itself
_ARCHITECTURE = ("model", *SHAPE)


@dataclass(frozen=True)
class StudyPlan:
    """The inputs that determine the commands of a study.

    only: names of students, rows or teachers; None for all. settings: `key=value` for every run that has the key.
    """

    study: Study
    out: Path
    seeds: Sequence[int]
    only: Collection[str] | None = None
    settings: Sequence[str] = ()

    def steps(self) -> list[Step]:
        """Return all steps in order: required teachers, students seed by seed, then chosen teachers that no step needs.

        Seed by seed, so that the rows of an unfinished study can already be compared. Raises ConfigError for settings
        or configs that cannot be run, and for more than MOST_RUNS runs.
        """
        self._check_command_line()
        teachers = _step_names(self.study.teachers, [TEACHER_SEED])
        students = _step_names(rows := self.study.rows(self.only), self.seeds)
        if len(students) > MOST_RUNS:
            cause = f"{len(rows)} rows with {len(self.seeds)} seeds are {len(students):,} runs, more than {MOST_RUNS}"
            raise ConfigError(cause, "give the axes fewer values, or take some at a time with --only and --seeds")
        chosen = {name: one for name, one in self.study.teachers.items() if self.only is None or name in self.only}
        steps = {name: self._step(name) for name in [*students, *_step_names(chosen, [TEACHER_SEED])]}
        while missing := {need for step in steps.values() for need in step.needs} - steps.keys():
            steps |= {name: self._step(name) for name in missing}
        self._require_use(steps.values())
        needed = {need for step in steps.values() for need in step.needs}
        order = dict.fromkeys([*(name for name in teachers if name in needed), *steps])
        return topological_order([steps[name] for name in order])

    def _step(self, name: str) -> Step:
        """Plan the run of this name, NETWORK/seed_K/STAGE."""
        owner, folder, stage = name.split("/")
        seed = int(folder.removeprefix("seed_"))
        root = STAGES[stage]
        path, texts = self._pretraining(owner) if stage == "pretrain" else self._finetuning(owner)
        start = self._networks[owner].steps(owner, seed)[0] if stage == "finetune" else None
        settings, teachers = self._filled(name, path, texts, root)
        settings += [f"run={self.out / name}", f"seed={seed}"]
        settings += [f"init.source=run:{self.out / start}"] if start is not None else []
        config = _load(name, path, settings, root)
        if config.run != str(self.out / name):
            cause = f"{self.out}: in run={self.out / name}, YAML reads {config.run}"
            raise ConfigError(cause, "use another folder, without ' #' and ': '")
        needs = (*([start] if start is not None else []), *teachers)
        return Step(name, (stage, path, *settings), needs, partial(is_done, config))

    def _filled(self, name: str, path: str, texts: Sequence[str], root: type[RunConfig]) -> tuple[list[str], list[str]]:
        """Return a run's settings, those of the command line last, with folders in place of placeholders, and the names
        of the steps that the placeholders stand for.
        """
        usable = self.study.teacher_steps(finetuned_only=root is FinetuneConfig)  # the others have no classifier
        filled, needs = list[str](), list[str]()
        given = self._given(root)
        for text in [*texts, *_used(name, given, path, [*texts, *given], root)]:
            if (key := text.partition("=")[0]) in _RESERVED_KEYS:
                raise ConfigError(f"{name}: {text}: the study sets {key} itself", "leave it out")
            for placeholder, step in usable.items():
                if placeholder in text:
                    text = text.replace(placeholder, f"run:{self.out / step}")
                    needs.append(step)
            if "{teacher." in text:
                remedy = f"use {join_first(usable)}" if usable else "add a teacher, with finetune: true for fine-tuning"
                raise ConfigError(f"{name}: {text} names no teacher that {root.title} can use", remedy)
            filled.append(text)
        return filled, list(dict.fromkeys(needs))

    def _pretraining(self, owner: str) -> tuple[str, list[str]]:
        """Return the config file of a pre-training and its settings.

        A student's config may name its own teacher, so that it also runs alone. The study's only teacher replaces that
        one, but not a teacher that the student's `set` or the command line names.
        """
        network = self._networks[owner]
        assert network.config is not None
        if isinstance(network, Teacher):
            return network.config, list(network.set)
        path = network.config
        shared, texts = self.study.pretrain_set, [*self.study.pretrain_set, *network.set]
        texts = [*_used(owner, shared, path, texts, PretrainConfig), *network.set]
        teachers = [name for name, teacher in self.study.teachers.items() if teacher.config is not None]
        named = any(text.startswith("teacher.source=") for text in (*texts, *self.settings))
        if named or not teachers:
            return path, texts
        config = self._inspect(owner, path, texts, PretrainConfig)
        if config.method == "mae" or config.teacher.source == EMA:
            return path, texts
        if len(teachers) > 1:
            cause = f"{owner}: the study has {len(teachers)} teachers, and the student does not name one"
            raise ConfigError(cause, f'set "teacher.source={{teacher.NAME}}"; NAME is one of {join_first(teachers)}')
        return path, [*texts, f"teacher.source={{teacher.{teachers[0]}}}"]

    def _finetuning(self, owner: str) -> tuple[str, list[str]]:
        """Return the config file of a fine-tuning and its settings.

        A student from scratch may have the architecture of another student. Its images are normalised alike then,
        unless fine-tuning sets its own normalisation.
        """
        network, recipe = self._networks[owner], self.study.finetune
        if isinstance(network, Teacher):
            return recipe.config, [*recipe.set, *network.finetune_set]
        settings = list(recipe.set)
        if (other := network.same_architecture_as) is not None:
            config = self._inspect(other, *self._pretraining(other), PretrainConfig)
            values = {key: getattr(config.student, key) for key in _ARCHITECTURE}
            settings += [f"student.{key}={value}" for key, value in values.items() if value is not None]
            if self._inspect(other, recipe.config, settings, FinetuneConfig).data.mean is None:
                settings += [f"data.mean={json.dumps(config.data.mean)}", f"data.std={json.dumps(config.data.std)}"]
        return recipe.config, [*settings, *self.study.finetune_set, *network.finetune_set]

    @cached_property
    def _networks(self) -> dict[str, Teacher | Student]:
        return self.study.rows() | self.study.teachers

    def _inspect(self, name: str, path: str, texts: Sequence[str], root: type[Root]) -> Root:
        """Return the config of a recipe that need not be complete."""
        return _load(name, path, self._filled(name, path, texts, root)[0], root, to_run=False)

    def _given(self, root: type[RunConfig]) -> list[str]:
        """Return the settings of the command line whose key the stage has."""
        known = {*all_keys(root), *all_sections(root)}
        return [text for text in self.settings if text.partition("=")[0] in known]

    def _require_use(self, steps: Collection[Step]) -> None:
        """Raise ConfigError for a setting of several runs that none of them uses."""
        used = {text for step in steps for text in step.command}
        shared = {"command line": self.settings, "pretrain_set": self.study.pretrain_set if self.only is None else ()}
        for place, texts in shared.items():
            for text in texts:
                if text not in used and "{teacher." not in text:
                    raise ConfigError(f"{place} {text}: no run of the study uses it", "leave it out")

    def _check_command_line(self) -> None:
        for text in self.settings:
            if text not in self._given(PretrainConfig) + self._given(FinetuneConfig):
                problem = unknown_key(text.partition("=")[0], PretrainConfig)
                raise ConfigError(f"command line {text}: {problem.cause}", problem.remedy)
        names = dict.fromkeys([*self.study.students, *self.study.teachers, *self._networks])
        for name in self.only or ():
            if name not in names:
                cause = f"--only {name}: the study has no network of that name"
                raise ConfigError(cause, f"it has {join_first(names)}")


def _used(name: str, shared: Sequence[str], path: str, texts: Sequence[str], root: type[RunConfig]) -> list[str]:
    """Return those of `shared`, settings of several runs, that the method of one run uses: of `path` with `texts`.

    A study gives alignment and teacher to all rows, and MAE among them has neither. name: of the run or its network.
    """
    if root is not PretrainConfig:
        return list(shared)
    with _named(name):
        method = read_setting(path, [text for text in texts if text.startswith("method=")], "method")
    unused = UNUSED_SECTIONS.get(method or PretrainConfig.model_fields["method"].default, ())
    return [text for text in shared if text.partition("=")[0].partition(".")[0] not in unused]


def _step_names(networks: Mapping[str, Teacher | Student], seeds: Sequence[int]) -> list[str]:
    """Return the names of all runs of the networks, seed by seed, each once."""
    steps = [step for seed in seeds for name, network in networks.items() for step in network.steps(name, seed)]
    return [step for step in dict.fromkeys(steps) if step is not None]


def topological_order(steps: Sequence[Step]) -> list[Step]:
    """Sort the steps so that each follows what it needs; of those that can start, the first in `steps` comes first."""
    places = {step.name: place for place, step in enumerate(steps)}
    sorter = TopologicalSorter({step.name: step.needs for step in steps})
    try:
        sorter.prepare()
    except CycleError as error:
        cause = f"these runs need each other: {' -> '.join(error.args[1])}"
        raise ConfigError(cause, "change the teachers that they name") from None
    ready, order = list[str](), list[Step]()
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=places.__getitem__)
        order.append(steps[places[ready.pop(0)]])
        sorter.done(order[-1].name)
    return order


def add_tests(steps: Sequence[Step], out: Path, shards: str) -> list[Step]:
    """Add a step after each fine-tuning that evaluates it on `shards` and writes TEST_FILE in the run's folder."""
    tested = []
    for step in steps:
        tested.append(step)
        if step.command[0] == FinetuneConfig.stage:
            run = out / step.name
            _, path, *settings = step.command
            data = _load(step.name, path, settings, FinetuneConfig).data
            members = Members(data.image_key, data.label_key)
            command = ["evaluate", str(run), shards, "--no-latency", "--json", str(run / TEST_FILE)]
            for flag, key in zip(("--image-key", "--label-key"), members, strict=True):
                command += [flag, key] if key else []
            done = partial(is_scored, run / TEST_FILE, shards, members)
            tested.append(Step(f"{step.name}/test", tuple(command), (step.name,), done))
    return tested


def _load(name: str, path: str, settings: Sequence[str], root: type[Root], *, to_run: bool = True) -> Root:
    with _named(name):
        return load_config(path, settings, root=root, to_run=to_run).config


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the run, or the network, whose settings are wrong."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error.cause}", error.remedy) from None
