"""From a study to its commands, on the configs that we ship: nothing is run here."""

from itertools import pairwise
from pathlib import Path

import pytest

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.values import STAGES
from maedistill.errors import ConfigError
from maedistill.models.vits import build_vit
from maedistill.study import plan as planning
from maedistill.study.file import load_study
from maedistill.study.plan import StudyPlan, add_tests, topological_order
from maedistill.study.runner import Step
from maedistill.study.schema import Student, Teacher
from tests.data.tar_files import write_split

OUT = Path("runs/x")
DATA = ["data.train=train.tar", "data.val=val.tar"]
VIT = ("student.model=vit_tiny_patch16_224", "student.width=48", "student.depth=2", "student.patch_size=8")
STUDENTS = ("scratch", "mae", "dmae")


@pytest.fixture
def study():
    return load_study("quickstart/study")


@pytest.fixture
def two(study):
    """Two teachers, the second taught by the first and fine-tuned."""
    first = study.teachers["teacher"].model_copy(update={"finetune": False})
    second = Teacher(config=study.students["dmae"].config, set=("teacher.source={teacher.first}",), finetune=True)
    return study.model_copy(update={"teachers": {"first": first, "second": second}})


def plan(study, *, out=OUT, seeds=(0,), only=None, settings=()):
    """The steps by name, and the config that each command stands for."""
    steps = StudyPlan(study, out, seeds, only, settings).steps()
    configs = {s.name: load_config(s.command[1], s.command[2:], root=STAGES[s.command[0]]).config for s in steps}
    assert len({step.name for step in steps}) == len(steps)
    return {step.name: step for step in steps}, configs


def changed(study, **students):
    """The study with these students instead of its own."""
    return study.model_copy(update={"students": students})


def test_a_study_is_whole_seed_by_seed_and_each_run_has_its_folder(study) -> None:
    steps, configs = plan(study, seeds=[0, 5])
    pairs = [f"{name}/{{}}/{stage}" for name in ("mae", "dmae") for stage in ("pretrain", "finetune")]
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
        "teacher/seed_0/finetune": ("teacher/seed_0/pretrain",),
    }
    for name, config in configs.items():
        if isinstance(config, PretrainConfig):
            expected = f"run:{OUT}/teacher/seed_0/pretrain" if config.method != "mae" else None
            assert config.teacher.source == expected
        elif "scratch" not in name:
            assert config.init.source == f"run:{OUT / steps[name].needs[0]}"


def test_several_teachers_come_before_what_they_teach_and_only_those_that_are_needed(two) -> None:
    dmae = two.students["dmae"].config
    kd = ("distill.teachers=[{teacher.second.finetuned}]", "distill.logits.weight=1")
    students = {
        "one": Student(config=dmae, set=("teacher.source={teacher.first}",)),
        "other": Student(config=dmae, set=("teacher.source={teacher.second}",)),
        "kd": Student(init_from="one", finetune_set=kd),
        "tuned": Student(config=dmae, set=("teacher.source={teacher.second.finetuned}",)),
    }
    steps, configs = plan(changed(two, **students))
    first, second, tuned = "first/seed_0/pretrain", "second/seed_0/pretrain", "second/seed_0/finetune"
    assert list(steps)[:3] == [first, second, tuned]
    assert steps[second].needs == (first,) and steps[tuned].needs == (second,)
    assert configs[second].teacher.source == f"run:{OUT / first}"
    for name, teacher in (("one", first), ("other", second), ("tuned", tuned)):
        assert steps[f"{name}/seed_0/pretrain"].needs == (teacher,)
        assert configs[f"{name}/seed_0/pretrain"].teacher.source == f"run:{OUT / teacher}"
    assert steps["kd/seed_0/finetune"].needs == ("one/seed_0/pretrain", tuned) and "kd/seed_0/pretrain" not in steps
    assert configs["kd/seed_0/finetune"].distill.teachers == (f"run:{OUT / tuned}",)
    one = plan(changed(two, **students), only=["one"])[0]
    assert list(one) == [first, "one/seed_0/pretrain", "one/seed_0/finetune"]
    assert list(plan(changed(two, **students), only=["second"])[0]) == [first, second, tuned]


def test_teachers_that_begin_alike_share_their_pretraining(two) -> None:
    early = Teacher(init_from="first", finetune=True, finetune_set=("optim.epochs=6",))
    two = two.model_copy(update={"teachers": {"early": early, "first": two.teachers["first"]}})
    taught = Student(finetune_set=(*VIT, "distill.teachers=[{teacher.early.finetuned}]", "distill.logits.weight=1"))
    steps, configs = plan(changed(two, dmae=two.students["dmae"], taught=taught))  # dmae: one teacher is pre-trained
    start, tuned = "first/seed_0/pretrain", "early/seed_0/finetune"
    assert list(steps)[:2] == [start, tuned] and steps[tuned].needs == (start,)
    assert configs[tuned].init.source == f"run:{OUT / start}" and configs[tuned].optim.epochs == 6
    assert configs["taught/seed_0/finetune"].distill.teachers == (f"run:{OUT / tuned}",)
    assert configs["dmae/seed_0/pretrain"].teacher.source == f"run:{OUT / start}"
    assert list(plan(changed(two, dmae=two.students["dmae"]), only=["early"])[0]) == [start, tuned]


def test_students_without_pre_training_start_from_another_s_whatever_their_order(study) -> None:
    students = {"x": Student(init_from="m", finetune_axes={"optim.lr": (1e-3, 2e-3)}), "m": study.students["mae"]}
    steps, configs = plan(changed(study, **students), seeds=[0, 1], only=["x_lr_0.002"])
    assert list(steps) == [name for k in (0, 1) for name in (f"m/seed_{k}/pretrain", f"x_lr_0.002/seed_{k}/finetune")]
    assert configs["x_lr_0.002/seed_1/finetune"].optim.lr == 0.002
    assert len(plan(changed(study, **students), only=["x"])[0]) == 3


def test_steps_are_ordered_by_what_they_need() -> None:
    steps = [Step("d", (), ("b", "c")), Step("c", (), ("a",)), Step("b", (), ("a",)), Step("e", ()), Step("a", ())]
    assert [step.name for step in topological_order(steps)] == ["e", "a", "c", "b", "d"]
    with pytest.raises(ConfigError, match=r"these runs need each other: (a -> b -> a|b -> a -> b)"):
        topological_order([Step("a", (), ("b",)), Step("b", (), ("a",))])


def test_fine_tuning_can_only_name_teachers_that_classify(two) -> None:
    for text in ("{teacher.first}", "{teacher.first.finetuned}", "{teacher.huge.finetuned}"):
        student = Student(finetune_set=(*VIT, f"distill.teachers=[{text}]"))
        with pytest.raises(ConfigError, match=r"no teacher that fine-tuning can use\nuse \{teacher.second.finetuned\}"):
            plan(changed(two, taught=student))
    student = Student(config=two.students["dmae"].config, set=("teacher.source={teacher.first.finetuned}",))
    with pytest.raises(ConfigError, match=r"no teacher that pre-training can use\nuse \{teacher.first\}, "):
        plan(changed(two, taught=student))


def test_teachers_that_teach_each_other_are_refused(two) -> None:
    first = two.teachers["second"].model_copy(update={"set": ("teacher.source={teacher.second}",)})
    two = two.model_copy(update={"teachers": {"first": first, "second": two.teachers["second"]}})
    with pytest.raises(ConfigError, match=r"these runs need each other: .*first/seed_0/pretrain"):
        plan(two, only=["second"])


def test_a_student_says_which_teacher_is_its_where_there_are_several(two) -> None:
    config = two.students["dmae"].config
    with pytest.raises(ConfigError, match=r"the study has 2 teachers(.|\n)*\{teacher.NAME\}(.|\n)*first, second"):
        plan(changed(two, dmae=Student(config=config)))
    outside = Student(config=config, set=("teacher.source=random:vit_tiny_patch16_224",))
    steps, configs = plan(changed(two, dmae=outside), only=["dmae"])
    assert configs["dmae/seed_0/pretrain"].teacher.source.startswith("random:") and len(steps) == 2
    with pytest.raises(ConfigError, match="method=mae has no teacher"):
        plan(changed(two, mae=Student(config=two.students["mae"].config, set=("teacher.source={teacher.first}",))))


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
        if isinstance(config, PretrainConfig):
            assert config.align.weight == (1 if config.method == "mae" else 4)
        else:
            assert config.augment.mixup == 0.3
    _, configs = plan(study)
    assert configs["ten/seed_0/pretrain"].align.weight == 10 and configs["ten/seed_0/pretrain"].log.every_steps == 3
    assert configs["ten/seed_0/finetune"].optim.epochs == 7 != configs["dmae/seed_0/finetune"].optim.epochs


def test_settings_for_all_may_name_the_method_that_uses_them(study) -> None:
    shared = ("method=amd", "masks.teacher_keep_ratio=0.5", "generate.weight=2")
    _, configs = plan(study.model_copy(update={"pretrain_set": shared}), only=["dmae"])
    config = configs["dmae/seed_0/pretrain"]
    assert (config.method, config.generate.weight) == ("amd", 2)


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
        ({"settings": ["optim.epoch=3"]}, "command line optim.epoch=3: unknown key optim.epoch", "optim.epochs"),
        ({"settings": ["align.weight=2"], "only": ["mae"]}, "command line align.weight=2: no run of", "leave it out"),
        ({"settings": ["run=x"]}, "run=x: the study sets run itself", "leave it out"),
        ({"settings": ["init.source=run:x"]}, "the study sets init.source itself", "leave it out"),
        ({"settings": ["teacher.source={teacher.me}"]}, "{teacher.me} names no teacher", "use {teacher.teacher}"),
        ({"settings": ["optim.epochs=many"]}, "mae: command line optim.epochs=many", "optim.epochs"),
        ({"out": Path("runs/y #1")}, "YAML reads runs/y", "without ' #' and ': '"),
        ({"only": ["dame"]}, "--only dame: the study has no network", "scratch, mae, dmae, teacher"),
        ({"seeds": range(100)}, "3 rows with 100 seeds are 500 runs, more than 300", "--only and --seeds"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(study, keywords, cause, remedy) -> None:
    with pytest.raises(ConfigError) as raised:
        plan(study, **keywords)
    assert cause in raised.value.cause and remedy in raised.value.remedy


def test_a_config_that_is_not_there_is_that_of_a_network(study) -> None:
    students = study.students | {"mae": study.students["mae"].model_copy(update={"config": "gone.yaml"})}
    with pytest.raises(ConfigError, match=r"^mae: there is no config file gone\.yaml"):
        plan(study.model_copy(update={"students": students}))


@pytest.mark.parametrize("text", ["seed=3", "run=a", "init.source=run:x"])
def test_what_the_study_sets_itself_is_refused_wherever_it_is_set(study, text) -> None:
    dmae, teacher = study.students["dmae"], study.teachers["teacher"]
    changes = [
        {"finetune_set": (text,)},
        {"finetune": study.finetune.model_copy(update={"set": (text,)})},
        {"students": {"dmae": dmae.model_copy(update={"finetune_set": (text,)})}},
        {"students": {"dmae": dmae, "x": Student(init_from="dmae", finetune_axes={text.partition("=")[0]: (3,)})}},
        {"teachers": {"teacher": teacher.model_copy(update={"finetune_set": (text,)})}},
    ]
    if not text.startswith("init"):
        changes += [{"pretrain_set": (text,)}, {"students": {"dmae": dmae.model_copy(update={"set": (text,)})}}]
        changes += [{"teachers": {"teacher": teacher.model_copy(update={"set": (text,)})}}]
    for change in changes:
        with pytest.raises(ConfigError, match=f"the study sets {text.partition('=')[0]} itself"):
            plan(study.model_copy(update=change))


def test_what_is_common_reaches_every_student_and_no_teacher(study) -> None:
    study = study.model_copy(update={"pretrain_set": ("optim.epochs=7",), "finetune_set": ("optim.epochs=8",)})
    for name, config in plan(study)[1].items():
        expected = 7 if name.endswith("pretrain") else 8
        assert (config.optim.epochs == expected) == (not name.startswith("teacher")), name


def test_a_step_whose_labels_are_too_few_is_seen_before_anything_starts(study, tmp_path) -> None:
    """3 classes of 4 images, of which a quarter is one of each class."""
    data = [f"data.train={write_split(tmp_path)}", f"data.val={write_split(tmp_path)}", "optim.epochs=1"]
    data += ["optim.warmup_epochs=0", "augment.mixup=0", "augment.cutmix=0", "data.label_fraction=0.25"]
    for batch in (3, 12):
        settings = [*data, f"optim.global_batch={batch}"]
        steps = StudyPlan(study, tmp_path / "out", [0], ["scratch"], settings).steps()
        tuned = next(step for step in steps if step.name == "scratch/seed_0/finetune")
        if batch == 3:
            assert not tuned.done()
        else:
            with pytest.raises(ConfigError, match=r"scratch/seed_0/finetune: optim\.epochs: .* 3 images"):
                tuned.done()


def test_each_step_asks_whether_its_own_run_is_done(study, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(planning, "is_done", lambda config: asked.append(config.run) or config.seed == 0)
    steps, _ = plan(study)
    assert asked == [] and all(step.done() for step in steps.values())
    assert asked == [str(OUT / name) for name in steps]


def test_every_fine_tuned_network_is_tested_after_it_is_there(study, monkeypatch) -> None:
    def is_scored(file, shards, members):
        assert members == (None, "output.cls")
        return (file, shards) == (OUT / "teacher/seed_0/finetune/test.json", "test.tar")

    monkeypatch.setattr(planning, "is_scored", is_scored)
    steps = add_tests(list(plan(study, settings=["data.label_key=output.cls"])[0].values()), OUT, "test.tar")
    names = [f"{network}/seed_0/finetune" for network in (*STUDENTS, "teacher")]
    assert sorted(step.name for step in steps if step.name.endswith("/test")) == sorted(
        f"{name}/test" for name in names
    )
    for before, step in pairwise(steps):
        if step.name.endswith("/test"):
            assert step.needs == (before.name,) and step.command[1:3] == (str(OUT / before.name), "test.tar")
            assert step.command[-2:] == ("--label-key", "output.cls")
            assert step.done() == (before.name == "teacher/seed_0/finetune")


def test_the_shipped_studies_plan(root) -> None:
    files = sorted(root.glob("configs/*/study*.yaml"))
    assert len(files) >= 4
    for file in files:
        plan(load_study(file), seeds=load_study(file).seeds, settings=DATA)
