"""From a study to its commands, on the configs that we ship: nothing is run here."""

import os
from itertools import pairwise
from pathlib import Path

import pytest

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError
from maedistill.models.encoder import build_vit
from maedistill.study.file import load_study
from maedistill.study.plan import StudyPlan, add_tests
from maedistill.study.schema import Student, Teacher

OUT = Path("runs/x")
DATA = ["data.train=train.tar", "data.val=val.tar"]
VIT = ("student.model=vit_tiny_patch16_224", "student.width=48", "student.depth=2", "student.patch_size=8")
STUDENTS = ("scratch", "mae", "dmae", "amd")


@pytest.fixture
def study(root):
    return load_study(os.path.relpath(root / "configs/quickstart/study.yaml"))


@pytest.fixture
def two(study):
    """Two teachers, the second taught by the first and fine-tuned."""
    first = study.teachers["teacher"].model_copy(update={"finetune": False})
    second = Teacher(config=study.students["dmae"].config, set=("teacher.source={teacher.first}",), finetune=True)
    return study.model_copy(update={"teachers": {"first": first, "second": second}})


def plan(study, *, seeds=(0,), only=None, settings=(), is_done=lambda config: False):
    """The steps by name, and the config that each command stands for."""
    steps = StudyPlan(study, OUT, seeds, only, settings, is_done).steps()
    roots = {"tools/pretrain.py": PretrainConfig, "tools/finetune.py": FinetuneConfig}
    configs = {s.name: load_config(s.command[1], s.command[2:], root=roots[s.command[0]]).config for s in steps}
    assert len({step.name for step in steps}) == len(steps)
    return {step.name: step for step in steps}, configs


def changed(study, **students):
    """The study with these students instead of its own."""
    return study.model_copy(update={"students": students})


def test_a_study_is_whole_seed_by_seed_and_each_run_has_its_folder(study) -> None:
    steps, configs = plan(study, seeds=[0, 5])
    pairs = [f"{name}/{{}}/{stage}" for name in ("mae", "dmae", "amd") for stage in ("pretrain", "finetune")]
    expected = [name.format(f"seed_{seed}") for seed in (0, 5) for name in ("scratch/{}/finetune", *pairs)]
    assert list(steps) == ["teacher/seed_0/pretrain", *expected, "teacher/seed_0/finetune"]
    for name, config in configs.items():
        assert config.run == str(OUT / name)
        assert config.seed == (5 if "seed_5" in name else 0)
    assert {name: step.needs for name, step in steps.items() if "seed_5" not in name} == {
        "teacher/seed_0/pretrain": (),
        "scratch/seed_0/finetune": (),
        "mae/seed_0/pretrain": (),
        "mae/seed_0/finetune": ("mae/seed_0/pretrain",),
        "dmae/seed_0/pretrain": ("teacher/seed_0/pretrain",),
        "dmae/seed_0/finetune": ("dmae/seed_0/pretrain",),
        "amd/seed_0/pretrain": ("teacher/seed_0/pretrain",),
        "amd/seed_0/finetune": ("amd/seed_0/pretrain",),
        "teacher/seed_0/finetune": ("teacher/seed_0/pretrain",),
    }
    for name, config in configs.items():
        if isinstance(config, PretrainConfig):
            expected = f"run:{OUT}/teacher/seed_0/pretrain" if config.method != "mae" else None
            assert config.teacher.source == expected
        elif "scratch" not in name:
            assert config.init.source == f"run:{OUT / steps[name].needs[0]}"


def test_several_teachers_come_before_what_they_teach_and_only_those_that_are_needed(two) -> None:
    dmae, kd = two.students["dmae"].config, ("init.license={teacher.second.finetuned}",)  # any key that takes text
    students = {
        "one": Student(config=dmae, teacher="first"),
        "axis": Student(config=dmae, axes={"teacher": ("first", "second")}),
        "kd": Student(pretraining_of="one", finetune_set=kd),
    }
    steps, configs = plan(changed(two, **students))
    first, second, tuned = "first/seed_0/pretrain", "second/seed_0/pretrain", "second/seed_0/finetune"
    assert list(steps)[:3] == [first, second, tuned]
    assert steps[second].needs == (first,) and steps[tuned].needs == (second,)
    assert configs[second].teacher.source == f"run:{OUT / first}"
    for name, teacher in (("one", first), ("axis_teacher_first", first), ("axis_teacher_second", second)):
        assert steps[f"{name}/seed_0/pretrain"].needs == (teacher,)
        assert configs[f"{name}/seed_0/pretrain"].teacher.source == f"run:{OUT / teacher}"
    assert steps["kd/seed_0/finetune"].needs == ("one/seed_0/pretrain", tuned) and "kd/seed_0/pretrain" not in steps
    assert configs["kd/seed_0/finetune"].init.license == f"run:{OUT / tuned}"
    one = plan(changed(two, **students), only=["one"])[0]
    assert list(one) == [first, "one/seed_0/pretrain", "one/seed_0/finetune"]
    assert list(plan(changed(two, **students), only=["second"])[0]) == [first, second, tuned]


def test_teachers_that_begin_alike_share_their_pretraining(two) -> None:
    early = Teacher(pretraining_of="first", finetune=True, finetune_set=("optim.epochs=6",))
    two = two.model_copy(update={"teachers": {"first": two.teachers["first"], "early": early}})
    taught = Student(finetune_set=(*VIT, "distill.teachers=[{teacher.early.finetuned}]", "distill.logits.weight=1"))
    steps, configs = plan(changed(two, dmae=two.students["dmae"], taught=taught))  # dmae: one teacher is pre-trained
    start, tuned = "first/seed_0/pretrain", "early/seed_0/finetune"
    assert list(steps)[:2] == [start, tuned] and steps[tuned].needs == (start,)
    assert configs[tuned].init.source == f"run:{OUT / start}" and configs[tuned].optim.epochs == 6
    assert configs["taught/seed_0/finetune"].distill.teachers == (f"run:{OUT / tuned}",)
    assert configs["dmae/seed_0/pretrain"].teacher.source == f"run:{OUT / start}"
    assert list(plan(changed(two, dmae=two.students["dmae"]), only=["early"])[0]) == [start, tuned]


def test_a_teacher_without_classifier_cannot_be_asked_for_predictions(two) -> None:
    taught = (*VIT, "distill.teachers=[{teacher.first}]")
    with pytest.raises(ConfigError, match=r"\{teacher.first\} is pre-trained only(.|\n)*teacher.first.finetuned"):
        plan(changed(two, taught=Student(finetune_set=(*taught, "distill.logits.weight=1"))))
    features = "distill.hints={weight: 1, student: [1], teacher: [1]}"
    assert len(plan(changed(two, taught=Student(finetune_set=(*taught, features))), only=["taught"])[0]) == 2


def test_a_student_says_which_teacher_is_its_where_there_are_several(two) -> None:
    config = two.students["dmae"].config
    with pytest.raises(ConfigError, match=r"the study has 2 teachers(.|\n)*add teacher: first or second"):
        plan(changed(two, dmae=Student(config=config)))
    outside = Student(config=config, set=("teacher.source=random:vit_tiny_patch16_224",))
    steps, configs = plan(changed(two, dmae=outside), only=["dmae"])
    assert configs["dmae/seed_0/pretrain"].teacher.source.startswith("random:") and len(steps) == 2
    with pytest.raises(ConfigError, match="method=mae has no teacher"):
        plan(changed(two, mae=Student(config=two.students["mae"].config, teacher="first")))


def test_axes_reach_the_configs_and_fine_tunings_share_their_pre_training(study) -> None:
    axes, tuned = {"masks.student_keep_ratio": (0.25, 0.5)}, {"optim.lr": (1e-3, 2e-3)}
    entry = Student(config=study.students["dmae"].config, axes=axes, finetune_axes=tuned)
    steps, configs = plan(changed(study, d=entry), seeds=[0, 1], only=["d"])
    assert len(steps) == 1 + 2 * (2 + 4)
    for visible in (0.25, 0.5):
        start = f"d_student_keep_ratio_{visible}/seed_1/pretrain"
        assert configs[start].masks.student_keep_ratio == visible
        for lr in (0.001, 0.002):
            last = f"d_student_keep_ratio_{visible}_lr_{lr}/seed_1/finetune"
            assert steps[last].needs == (start,) and configs[last].optim.lr == lr
    row = "d_student_keep_ratio_0.5_lr_0.002"
    only = list(plan(changed(study, d=entry), only=[row])[0])
    assert only == ["teacher/seed_0/pretrain", "d_student_keep_ratio_0.5/seed_0/pretrain", f"{row}/seed_0/finetune"]


def test_from_scratch_is_the_network_of_the_other_student_on_images_normalised_alike(study) -> None:
    normalisation = ["data.mean=[0.1,0.2,0.3]", "data.std=[0.5,0.5,0.4]"]
    mae = study.students["mae"].model_copy(update={"set": ("student.depth=3", *normalisation)})
    _, configs = plan(study.model_copy(update={"students": study.students | {"mae": mae}}), only=["scratch"])
    scratch = configs["scratch/seed_0/finetune"]
    vit = build_vit("vit_tiny_patch16_224", image_size=32, width=96, depth=3, num_heads=4, patch_size=4)
    architecture = scratch.student_architecture
    assert (architecture.width, architecture.depth, architecture.num_heads) == (vit.embed_dim, 3, 4)
    assert scratch.init.source is None and scratch.data.mean == (0.1, 0.2, 0.3) and scratch.data.std == (0.5, 0.5, 0.4)


def test_from_scratch_may_also_be_a_network_of_its_own(study) -> None:
    steps, configs = plan(changed(study, plain=Student(finetune_set=VIT)), only=["plain"])
    assert list(steps) == ["plain/seed_0/finetune"]
    assert configs["plain/seed_0/finetune"].student.width == 48 and configs["plain/seed_0/finetune"].init.source is None
    with pytest.raises(ConfigError, match=r"plain/seed_0/finetune: .*neither weights nor student.model"):
        plan(changed(study, plain=Student()))


def test_a_normalisation_that_fine_tuning_names_holds_for_all(study) -> None:
    named = study.finetune.model_copy(update={"set": ("data.mean=[0.1,0.1,0.1]", "data.std=[0.2,0.2,0.2]")})
    _, configs = plan(study.model_copy(update={"finetune": named}), only=["scratch", "mae"])
    assert {c.data.mean for c in configs.values() if isinstance(c, FinetuneConfig)} == {(0.1, 0.1, 0.1)}


def test_settings_reach_the_runs_that_have_the_key_and_overrule_the_file(study) -> None:
    ten = {"set": ("align.weight=10", "log.every_steps=3"), "finetune_set": ("optim.epochs=7",)}
    ten = study.students["dmae"].model_copy(update=ten)
    study = study.model_copy(update={"students": study.students | {"ten": ten}})
    settings = ["threads=2", "align.weight=4", "augment.mixup=0.3", "engine={micro_batch: 8}"]
    _, configs = plan(study, settings=settings)
    for config in configs.values():
        assert config.threads == 2 and config.engine.micro_batch == 8
        assert config.align.weight == 4 if isinstance(config, PretrainConfig) else config.augment.mixup == 0.3
    _, configs = plan(study)
    assert configs["ten/seed_0/pretrain"].align.weight == 10 and configs["ten/seed_0/pretrain"].log.every_steps == 3
    assert configs["ten/seed_0/finetune"].optim.epochs == 7 != configs["dmae/seed_0/finetune"].optim.epochs


def test_a_teacher_may_be_set_for_all_from_outside(study) -> None:
    outside = "teacher.source=timm:vit_large_patch16_224.mae"
    for keywords in ({"settings": [outside]}, {}):
        entry = Student(config=study.students["dmae"].config, set=() if keywords else (outside,))
        steps, configs = plan(changed(study, other=entry), only=["other"], **keywords)
        assert list(steps) == ["other/seed_0/pretrain", "other/seed_0/finetune"]
        assert configs["other/seed_0/pretrain"].teacher.source.startswith("timm:")


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["mae"], ["mae/seed_0/pretrain", "mae/seed_0/finetune"]),
        (["dmae"], ["teacher/seed_0/pretrain", "dmae/seed_0/pretrain", "dmae/seed_0/finetune"]),
        (["teacher"], ["teacher/seed_0/pretrain", "teacher/seed_0/finetune"]),
    ],
)
def test_only_some_students_and_what_they_need(study, only, expected) -> None:
    assert list(plan(study, only=only)[0]) == expected


@pytest.mark.parametrize(
    ("keywords", "cause", "remedy"),
    [
        ({"settings": ["optim.epoch=3"]}, "command line optim.epoch=3: there is no key optim.epoch", "optim.epochs"),
        ({"settings": ["run=x"]}, "command line run=x: the study sets run itself", "leave it out"),
        ({"settings": ["init.source=run:x"]}, "the study sets init.source itself", "leave it out"),
        ({"settings": ["teacher.source={teacher.teacher}"]}, "{teacher.teacher} names no teacher", "in the study file"),
        ({"settings": ["optim.epochs=many"]}, "mae: command line optim.epochs=many", "optim.epochs"),
        ({"only": ["dame"]}, "--only dame: the study has nobody", "scratch, mae, dmae, amd, teacher"),
        ({"seeds": range(100)}, "4 rows with 100 seeds are 700 runs, more than 300", "--only and --seeds"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(study, keywords, cause, remedy) -> None:
    with pytest.raises(ConfigError) as raised:
        plan(study, **keywords)
    assert cause in raised.value.cause and remedy in raised.value.remedy


def test_each_step_asks_whether_its_own_run_is_done(study) -> None:
    asked = []
    steps, _ = plan(study, is_done=lambda config: asked.append(config.run) or config.seed == 0)
    assert asked == [] and all(step.done() for step in steps.values())
    assert asked == [str(OUT / name) for name in steps]


def test_every_fine_tuned_network_is_tested_after_it_is_there(study) -> None:
    def is_scored(file, shards):
        return (file, shards) == (OUT / "teacher/seed_0/finetune/test.json", "test.tar")

    steps = add_tests(list(plan(study)[0].values()), OUT, "test.tar", is_scored)
    names = [f"{network}/seed_0/finetune" for network in (*STUDENTS, "teacher")]
    assert sorted(step.name for step in steps if step.name.endswith("/test")) == sorted(
        f"{name}/test" for name in names
    )
    for before, step in pairwise(steps):
        if step.name.endswith("/test"):
            assert step.needs == (before.name,) and step.command[1:3] == (str(OUT / before.name), "test.tar")
            assert step.done() == (before.name == "teacher/seed_0/finetune")


def test_the_shipped_studies_plan(root) -> None:
    files = sorted(root.glob("configs/*/study*.yaml"))
    assert len(files) >= 4
    for file in files:
        plan(load_study(file), seeds=load_study(file).seeds, settings=DATA)
