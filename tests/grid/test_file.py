"""Grid files: what a right one becomes, and that each mistake is named with its line and mended by what is said."""

from pathlib import Path

import pytest

from maedistill.errors import ConfigError
from maedistill.grid.file import load_grid

GRID = """\
out: runs/x
seeds: [0, 1]
teacher: {config: teacher.yaml}
students:
  scratch: {shape_of: mae}
  mae: {config: mae.yaml}
  ten: {config: ../other/dmae.yaml, set: [align.weight=10], finetune_set: [optim.epochs=2]}
finetune: {config: finetune.yaml}
pretrain_set: [log.every=5]
"""
# What is replaced in GRID, by what, and what the two lines of the error name.
MISTAKES = {
    "typo": ("seeds:", "seed:", "g.yaml:2 seed: there is no such key", "did you mean seeds"),
    "typo below": ("finetune_set", "finetune_sett", "g.yaml:7 students.ten.finetune_sett", "finetune_set"),
    "missing": ("out: runs/x\n", "", "out: it is missing", "configs/cifar10/grid.yaml"),
    "no config": ("{config: teacher.yaml}", "{set: []}", "teacher.config: it is missing", ""),
    "wrong type": ("[0, 1]", "[0, one]", "g.yaml:2 seeds.1: ", "configs/cifar10/grid.yaml"),
    "seed twice": ("[0, 1]", "[1, 1]", "g.yaml:2 seeds: [1, 1]", "[0, 1, 2]"),
    "no seeds": ("[0, 1]", "[]", "g.yaml:2 seeds: []", "[0, 1, 2]"),
    "nobody": ("{shape_of: mae}", "null", "g.yaml:5 students.scratch", ""),
    "neither": ("{shape_of: mae}", "{finetune_set: []}", "g.yaml:5 students.scratch: a student has", "shape_of"),
    "both": ("{shape_of: mae}", "{shape_of: mae, config: a.yaml}", "g.yaml:5 students.scratch: a student has", ""),
    "shape of nobody": ("shape_of: mae", "shape_of: scratch", "g.yaml:5 students.scratch.shape_of", "mae or ten"),
    "set from scratch": ("shape_of: mae", "shape_of: mae, set: [a=1]", "students.scratch.set", "finetune_set"),
    "folder": ("  ten:", "  logs:", "g.yaml:7 students.logs: logs cannot name", "letters"),
    "own key": ("align.weight=10", "seed=3", "g.yaml:7 students.ten.set: the grid sets seed itself", "remove"),
    "own key for all": ("log.every=5", "run=a", "g.yaml:9 pretrain_set: the grid sets run itself", "remove"),
    "no teacher": ("teacher: {config: teacher.yaml}", "finetune_teacher: true", "g.yaml:3 finetune_teacher", "add one"),
    "not YAML": ("[0, 1]", "[0, 1", "g.yaml:", ""),
    "key twice": ("  ten:", "  mae:", "g.yaml:7: mae is given twice", "keep one"),
}


def test_paths_are_found_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "grids").mkdir()
    (tmp_path / "grids/g.yaml").write_text(GRID)
    grid = load_grid(tmp_path / "grids/g.yaml")
    assert grid.out == "runs/x" and grid.seeds == (0, 1) and not grid.finetune_teacher
    assert list(grid.students) == ["scratch", "mae", "ten"]
    assert grid.teacher.config == str(tmp_path / "grids/teacher.yaml")
    assert grid.students["ten"].config == str(tmp_path / "other/dmae.yaml")
    assert grid.students["ten"].set == ("log.every=5", "align.weight=10")
    assert grid.students["scratch"].config is None and grid.students["scratch"].shape_of == "mae"
    assert grid.students["mae"].set == ("log.every=5",) and grid.students["scratch"].set == ()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_with_their_place(tmp_path: Path, mistake: str) -> None:
    old, new, cause, remedy = MISTAKES[mistake]
    assert old in GRID
    (tmp_path / "g.yaml").write_text(GRID.replace(old, new))
    with pytest.raises(ConfigError) as raised:
        load_grid(tmp_path / "g.yaml")
    assert cause in raised.value.cause and remedy in raised.value.remedy, raised.value
    assert "\n" not in raised.value.cause + raised.value.remedy


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load_grid(tmp_path / "none.yaml")
