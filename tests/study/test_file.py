"""Study files: what a right one becomes, and that each mistake is named with its line and mended by what is said."""

from pathlib import Path

import pytest

from maedistill.errors import ConfigError
from maedistill.study.file import load_study

STUDY = """\
out: runs/x
seeds: [0, 1]
teachers: {large: {config: teacher.yaml, finetune: true}, small: {config: ../t/s.yaml}}
students:
  scratch: {same_architecture_as: mae}
  mae: {config: mae.yaml}
  ten: {config: ../other/dmae.yaml, set: [align.weight=10], finetune_set: [optim.epochs=2]}
  tuned: {init_from: mae, finetune_axes: {optim: {lr: [1, 2]}}}
  plain: {}
finetune: {config: finetune.yaml}
pretrain_set: [log.every_steps=5]
finetune_set: [optim.ema=0.9]
baseline: mae
"""
EARLY = "init_from: large, finetune: true"
# What is replaced in STUDY, by what, and what the two lines of the error name.
MISTAKES = {
    "typo": ("seeds:", "seed:", "g.yaml:2 seed: unknown key", "did you mean seeds"),
    "typo below": ("ten: {config", "ten: {finetune_sett: [], config", "g.yaml:7 students.ten.finetune_sett", "_set"),
    "missing": ("out: runs/x\n", "", "g.yaml:1 out: field required", "cifar10/study_methods"),
    "no config": ("{config: teacher.yaml,", "{set: [],", "g.yaml:3 teachers.large: it has neither config", "one of"),
    "wrong type": ("[0, 1]", "[0, one]", "g.yaml:2 seeds.1: ", "cifar10/study_methods"),
    "seed twice": ("[0, 1]", "[1, 1]", "g.yaml:2 seeds: [1, 1]", "[0, 1, 2]"),
    "no seeds": ("[0, 1]", "[]", "g.yaml:2 seeds: ", "cifar10/study_methods"),
    "nobody": ("{same_architecture_as: mae}", "null", "g.yaml:5 students.scratch", ""),
    "both": ("as: mae}", "as: mae, config: a}", "g.yaml:5 students.scratch: it has both config and same_", "keep one"),
    "shape of nobody": ("as: mae", "as: scratch", "g.yaml:5 students.scratch.same_architecture_as: ", "mae, ten"),
    "start of nobody": ("init_from: mae", "init_from: many", "g.yaml:8 students.tuned.init_from: ", "mae, ten"),
    "set from scratch": ("as: mae", "as: mae, set: [a=1]", "students.scratch.set", "finetune_set"),
    "axes of a pre-training": (
        "init_from: mae",
        "config: mae.yaml",
        "g.yaml:8 students.tuned.finetune_axes",
        "init_from",
    ),
    "folder": ("  ten:", "  logs:", "g.yaml:7 students.logs: logs cannot name", "letters"),
    "a climbing folder": ("  ten:", "  ../ten:", "g.yaml:7: ../ten: dots are for the command line", ""),
    "a teacher's name": ("  ten:", "  small:", "g.yaml:3 teachers.small: two networks would be named small", "another"),
    "rows of one name": ("[1, 2]", "[0.1, 0.10]", "g.yaml:8 students.tuned: two networks would be", "another"),
    "names that meet": (
        "ten:",
        "tuned_lr_1:",
        "students.tuned_lr_1: two networks would be named tuned_lr_1",
        "another",
    ),
    "no values": ("[1, 2]", "[]", "g.yaml:8 students.tuned.finetune_axes.optim.lr: ", ""),
    "an explosion": (
        "{lr: [1, 2]}",
        f"{{lr: {[*range(999)]}, epochs: {[*range(999)]}, ema: {[*range(999)]}}}",
        "g.yaml:5 students: they are 997,003,003 rows, more than 300",
        "fewer",
    ),
    "a long name": ("[1, 2]", f"[{'x' * 150}]", "g.yaml:8 students.tuned: tuned_lr_xxx", "at most 120 letters"),
    "baseline": (
        "baseline: mae",
        "baseline: mea",
        "g.yaml:13 baseline: mea is not a row",
        "scratch, mae, ten, tuned_lr_1",
    ),
    "a line's row": ("baseline: mae", "lines: {MAE: [mae, mea]}", "lines.MAE: mea is not a row", "scratch, mae, ten"),
    "like itself": ("config: ../t/s.yaml", "init_from: small", "small.init_from", ""),
    "like another": ("config: ../t/s.yaml", "init_from: large", "it is the same network", "finetune: true"),
    "like nobody": (
        "config: ../t/s.yaml",
        "init_from: huge, finetune: true",
        "there is no pre-trained teacher huge",
        "use large",
    ),
    "two beginnings": ("config: ../t/s.yaml", "config: a, init_from: large", "small: it has both", "keep one"),
    "no pre-training": ("config: ../t/s.yaml", f"{EARLY}, set: [a=1]", "small.set: it is for pre-tr", "finetune_set"),
    "not fine-tuned": ("t/s.yaml}", "t/s.yaml, finetune_set: [a=1]}", "small.finetune_set: this", "finetune: true"),
}


def test_paths_are_found_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/g.yaml").write_text(STUDY.replace("config: finetune.yaml", "config: cifar10/finetune"))
    study = load_study(tmp_path / "studies/g.yaml")
    assert study.out == "runs/x" and study.seeds == (0, 1) and study.baseline == "mae"
    assert list(study.students) == ["scratch", "mae", "ten", "tuned", "plain"]
    assert study.teachers["large"].config == str(tmp_path / "studies/teacher.yaml") and study.teachers["large"].finetune
    assert study.teachers["small"].config == str(tmp_path / "t/s.yaml") and not study.teachers["small"].finetune
    assert study.teachers["small"].set == study.teachers["small"].finetune_set == ()
    assert study.students["ten"].config == str(tmp_path / "other/dmae.yaml")
    assert study.students["ten"].set == ("align.weight=10",) and study.pretrain_set == ("log.every_steps=5",)
    assert study.students["ten"].finetune_set == ("optim.epochs=2",) and study.finetune_set == ("optim.ema=0.9",)
    assert study.finetune.config == "cifar10/finetune", "a shipped config's name, as on the command line"
    assert study.students["scratch"].config is None and study.students["scratch"].same_architecture_as == "mae"
    assert study.students["tuned"].finetune_axes == {"optim.lr": (1, 2)}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_with_their_place(tmp_path: Path, mistake: str) -> None:
    old, new, cause, remedy = MISTAKES[mistake]
    assert old in STUDY
    (tmp_path / "g.yaml").write_text(STUDY.replace(old, new))
    with pytest.raises(ConfigError) as raised:
        load_study(tmp_path / "g.yaml")
    assert cause in raised.value.cause and remedy in raised.value.remedy, raised.value
    assert raised.value.remedy
    assert "\n" not in raised.value.cause + raised.value.remedy


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load_study(tmp_path / "none.yaml")
