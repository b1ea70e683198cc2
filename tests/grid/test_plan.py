"""From a grid to its commands, on the configs that we ship: nothing is run here."""

import os
from itertools import pairwise
from pathlib import Path

import pytest

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError
from maedistill.grid.file import Student, load_grid
from maedistill.grid.plan import GridPlan, add_tests
from maedistill.models.encoder import build_vit

OUT = Path("runs/x")
DATA = ["data.train=train.tar", "data.val=val.tar"]


@pytest.fixture
def grid(root):
    return load_grid(os.path.relpath(root / "configs/quickstart/grid.yaml"))


def plan(grid, *, seeds=(0,), only=None, settings=(), is_done=lambda config: False):
    """The steps by name, and the config that each command stands for."""
    steps = GridPlan(grid, OUT, seeds, only, settings, is_done).steps()
    roots = {"tools/pretrain.py": PretrainConfig, "tools/finetune.py": FinetuneConfig}
    configs = {s.name: load_config(s.command[1], s.command[2:], root=roots[s.command[0]]).config for s in steps}
    return {step.name: step for step in steps}, configs


def test_a_grid_is_whole_seed_by_seed_and_each_run_has_its_folder(grid) -> None:
    steps, configs = plan(grid, seeds=[0, 5])
    pairs = [f"{name}/{{}}/{stage}" for name in ("mae", "dmae", "amd") for stage in ("pretrain", "finetune")]
    expected = [name.format(f"seed_{seed}") for seed in (0, 5) for name in ("scratch/{}/finetune", *pairs)]
    assert list(steps) == ["teacher", *expected, "teacher_finetune"]
    for name, config in configs.items():
        assert config.run == str(OUT / name)
        assert config.seed == (5 if "seed_5" in name else 0)
    assert {name: step.needs for name, step in steps.items() if "seed_5" not in name} == {
        "teacher": (),
        "scratch/seed_0/finetune": (),
        "mae/seed_0/pretrain": (),
        "mae/seed_0/finetune": ("mae/seed_0/pretrain",),
        "dmae/seed_0/pretrain": ("teacher",),
        "dmae/seed_0/finetune": ("dmae/seed_0/pretrain",),
        "amd/seed_0/pretrain": ("teacher",),
        "amd/seed_0/finetune": ("amd/seed_0/pretrain",),
        "teacher_finetune": ("teacher",),
    }
    for name, config in configs.items():
        if isinstance(config, PretrainConfig):
            assert config.teacher.source == (f"run:{OUT}/teacher" if config.method != "mae" else None)
        elif "scratch" not in name:
            assert config.init.source == f"run:{OUT / steps[name].needs[0]}"


def test_from_scratch_is_the_network_of_the_other_student_on_images_normalised_alike(grid) -> None:
    normalisation = ["data.mean=[0.1,0.2,0.3]", "data.std=[0.5,0.5,0.4]"]
    mae = grid.students["mae"].model_copy(update={"set": ("student.depth=3", *normalisation)})
    _, configs = plan(grid.model_copy(update={"students": grid.students | {"mae": mae}}), only=["scratch"])
    scratch = configs["scratch/seed_0/finetune"]
    vit = build_vit("vit_tiny_patch16_224", image_size=32, width=96, depth=3, heads=4, patch_size=4)
    architecture = scratch.student_architecture
    assert (architecture.width, architecture.depth, architecture.heads) == (vit.embed_dim, 3, 4)
    assert scratch.init.source is None and scratch.data.mean == (0.1, 0.2, 0.3) and scratch.data.std == (0.5, 0.5, 0.4)


def test_a_normalisation_that_fine_tuning_names_holds_for_all(grid) -> None:
    named = grid.finetune.model_copy(update={"set": ("data.mean=[0.1,0.1,0.1]", "data.std=[0.2,0.2,0.2]")})
    _, configs = plan(grid.model_copy(update={"finetune": named}), only=["scratch", "mae"])
    assert {c.data.mean for c in configs.values() if isinstance(c, FinetuneConfig)} == {(0.1, 0.1, 0.1)}


def test_settings_reach_the_runs_that_have_the_key_and_overrule_the_file(grid) -> None:
    ten = {"set": ("align.weight=10", "log.every=3"), "finetune_set": ("optim.epochs=7",)}
    ten = grid.students["dmae"].model_copy(update=ten)
    grid = grid.model_copy(update={"students": grid.students | {"ten": ten}})
    settings = ["threads=2", "align.weight=4", "augment.mixup=0.3", "engine={micro_batch: 8}"]
    _, configs = plan(grid, settings=settings)
    for config in configs.values():
        assert config.threads == 2 and config.engine.micro_batch == 8
        assert config.align.weight == 4 if isinstance(config, PretrainConfig) else config.augment.mixup == 0.3
    _, configs = plan(grid)
    assert configs["ten/seed_0/pretrain"].align.weight == 10 and configs["ten/seed_0/pretrain"].log.every == 3
    assert configs["ten/seed_0/finetune"].optim.epochs == 7 != configs["dmae/seed_0/finetune"].optim.epochs


def test_a_student_may_have_another_teacher(grid) -> None:
    other = Student(config=grid.students["dmae"].config, set=("teacher.source=timm:vit_large_patch16_224.mae",))
    steps, configs = plan(grid.model_copy(update={"students": {"other": other}}), only=["other"])
    assert list(steps) == ["other/seed_0/pretrain", "other/seed_0/finetune"]
    assert configs["other/seed_0/pretrain"].teacher.source.startswith("timm:")


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["mae"], ["mae/seed_0/pretrain", "mae/seed_0/finetune"]),
        (["dmae"], ["teacher", "dmae/seed_0/pretrain", "dmae/seed_0/finetune"]),
        (["teacher"], ["teacher", "teacher_finetune"]),
    ],
)
def test_only_some_students_and_what_they_need(grid, only, expected) -> None:
    assert list(plan(grid, only=only)[0]) == expected


@pytest.mark.parametrize(
    ("keywords", "cause", "remedy"),
    [
        ({"settings": ["optim.epoch=3"]}, "command line optim.epoch=3: there is no key optim.epoch", "optim.epochs"),
        ({"settings": ["run=x"]}, "command line run=x: the grid sets run itself", "leave it out"),
        ({"settings": ["init.source=run:x"]}, "the grid sets init.source itself", "leave it out"),
        (
            {"settings": ["optim.epochs=many"]},
            "mae: command line optim.epochs=many",
            "optim.epochs",
        ),
        ({"only": ["dame"]}, "--only dame: there is no such student", "scratch, mae, dmae, amd, teacher"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(grid, keywords, cause, remedy) -> None:
    with pytest.raises(ConfigError) as raised:
        plan(grid, **keywords)
    assert cause in raised.value.cause and remedy in raised.value.remedy


def test_each_step_asks_whether_its_own_run_is_done(grid) -> None:
    asked = []
    steps, _ = plan(grid, is_done=lambda config: asked.append(config.run) or config.seed == 0)
    assert asked == [] and all(step.done() for step in steps.values())
    assert asked == [str(OUT / name) for name in steps]


def test_every_fine_tuned_network_is_tested_after_it_is_there(grid) -> None:
    def is_scored(file, shards):
        return (file, shards) == (OUT / "teacher_finetune/test.json", "test.tar")

    steps = add_tests(list(plan(grid)[0].values()), OUT, "test.tar", is_scored)
    names = [*(f"{student}/seed_0/finetune" for student in grid.students), "teacher_finetune"]
    assert [step.name for step in steps if step.name.endswith("/test")] == [f"{name}/test" for name in names]
    for before, step in pairwise(steps):
        if step.name.endswith("/test"):
            assert step.needs == (before.name,) and step.command[1:3] == (str(OUT / before.name), "test.tar")
            assert step.done() == (before.name == "teacher_finetune")


def test_the_shipped_grids_plan(root) -> None:
    for file in sorted([*root.glob("configs/*/grid.yaml"), *root.glob("configs/*/study.yaml")]):
        plan(load_grid(file), seeds=load_grid(file).seeds, settings=DATA)
