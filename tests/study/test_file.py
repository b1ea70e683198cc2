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
  scratch: {shape_of: mae}
  mae: {config: mae.yaml}
  ten: {config: ../other/dmae.yaml, set: [align.weight=10], finetune_set: [optim.epochs=2], teacher: small}
  many: {config: dmae.yaml, axes: {teacher: [small, large], masks: {student_keep_ratio: [0.1, 0.25]}}}
  tuned: {pretraining_of: mae, finetune_axes: {optim: {lr: [1, 2]}}}
  plain: {}
finetune: {config: finetune.yaml}
pretrain_set: [log.every_steps=5]
finetune_set: [optim.ema=0.9]
baseline: mae
"""
EARLY = "pretraining_of: large, finetune: true"
OF_EARLY = f"{{config: a}}, e: {{{EARLY}}}, late: {{config: b, set: ['a={{teacher.e}}']}}"
# What is replaced in STUDY, by what, and what the two lines of the error name.
MISTAKES = {
    "typo": ("seeds:", "seed:", "g.yaml:2 seed: there is no such key", "did you mean seeds"),
    "typo below": ("ten: {config", "ten: {finetune_sett: [], config", "g.yaml:7 students.ten.finetune_sett", "_set"),
    "missing": ("out: runs/x\n", "", "out: it is missing", "configs/cifar10/study_methods.yaml"),
    "no config": ("{config: teacher.yaml,", "{set: [],", "g.yaml:3 teachers.large: it has neither", "config:"),
    "wrong type": ("[0, 1]", "[0, one]", "g.yaml:2 seeds.1: ", "configs/cifar10/study_methods.yaml"),
    "seed twice": ("[0, 1]", "[1, 1]", "g.yaml:2 seeds: [1, 1]", "[0, 1, 2]"),
    "no seeds": ("[0, 1]", "[]", "g.yaml:2 seeds: []", "[0, 1, 2]"),
    "nobody": ("{shape_of: mae}", "null", "g.yaml:5 students.scratch", ""),
    "both": ("{shape_of: mae}", "{shape_of: mae, config: a}", "g.yaml:5 students.scratch: it has both", "keep one"),
    "shape of nobody": ("shape_of: mae", "shape_of: scratch", "g.yaml:5 students.scratch.shape_of", "mae, ten, many_"),
    "start of nobody": ("pretraining_of: mae", "pretraining_of: many", "g.yaml:9 students.tuned.pretr", "mae, ten, ma"),
    "set from scratch": ("shape_of: mae", "shape_of: mae, set: [a=1]", "students.scratch.set", "finetune_set"),
    "axes from scratch": ("plain: {}", "plain: {axes: {a: [1]}}", "g.yaml:10 students.plain.axes", "finetune_axes"),
    "folder": ("  ten:", "  logs:", "g.yaml:7 students.logs: logs cannot name", "letters"),
    "a teacher's name": ("  ten:", "  small:", "g.yaml:7 students.small: a teacher has that name", "another"),
    "rows of one name": ("[0.1, 0.25]", "[0.1, 0.10]", "g.yaml:8 students.many: two networks would be", "other names"),
    "names that meet": ("ten:", "tuned_lr_1:", "students.tuned_lr_1: two networks would be named tuned_lr_1", "other"),
    "own key": ("align.weight=10", "seed=3", "g.yaml:7 students.ten.set: the study sets seed itself", "remove"),
    "own axis": ("masks: {student_keep_ratio", "init: {source", "many.axes.init.source: the study sets", "remove"),
    "own key for all": ("log.every_steps=5", "run=a", "g.yaml:12 pretrain_set: the study sets run itself", "remove"),
    "unknown teacher": ("teacher: small}", "teacher: smal}", "there is no pre-trained teacher smal", "large"),
    "unknown on an axis": ("[small, large]", "[small, huge]", "g.yaml:8 students.many.axes.teacher: there is", "large"),
    "no name on an axis": ("[small, large]", "[[small], null]", "no pre-trained teacher ['small']", "use large, small"),
    "teacher twice": ("axes: {teacher", "teacher: small, axes: {teacher", "g.yaml:8 students.many.teacher", "one of"),
    "a source beside it": ("align.weight=10", "teacher.source=run:x", "its set names a teacher.source", "one of them"),
    "teacher of fine-tuning": ("{optim: {lr", "{teacher: [small], optim: {lr", "g.yaml:9", "{teacher.NAME.finetuned}"),
    "no values": (
        "[0.1, 0.25]",
        "[]",
        "g.yaml:8 students.many.axes.masks.student_keep_ratio: it has no values",
        "list",
    ),
    "no list": ("[0.1, 0.25]", "0.1", "g.yaml:8 students.many.axes.masks.student_keep_ratio: ", ""),
    "an explosion": ("[0.1, 0.25]", f"{[*range(200)]}", "g.yaml:8 students.many: 2 x 200 values are 400 r", "fewer"),
    "many small ones": ("[0.1, 0.25]", f"{[*range(149)]}", "g.yaml:5 students: they are more than 300 rows", "fewer"),
    "a long name": ("[0.1, 0.25]", f"[{'x' * 150}]", "letters, too long for a folder", "a name of its own"),
    "baseline": ("baseline: mae", "baseline: mea", "g.yaml:14 baseline: mea is no row", "scratch, mae, ten, many_"),
    "like itself": ("config: ../t/s.yaml", "pretraining_of: small", "small.pretraining_of", "use large"),
    "like a later one": ("config: teacher.yaml", "pretraining_of: small", "g.yaml:3 teachers.large.pretr", "above it"),
    "like another": ("config: ../t/s.yaml", "pretraining_of: large", "it is the same network", "finetune: true"),
    "two beginnings": ("config: ../t/s.yaml", "config: a, pretraining_of: large", "small: it has both", "use one"),
    "no pre-training": ("config: ../t/s.yaml", f"{EARLY}, set: [a=1]", "small.set: it is for pre-tr", "finetune_set"),
    "no teacher yet": ("config: ../t/s.yaml", EARLY, "students.ten.teacher: there is no pre-trained", "use large"),
    "not its own": ("{config: ../t/s.yaml}", OF_EARLY, "that teacher's pre-training is {teacher.large}", "r.e.fine"),
    "placeholder": ("optim.ema=0.9", "'a={teacher.huge}'", "g.yaml:13 finetune_set: {teacher.huge} names", "{teacher."),
    "not tuned": ("optim.ema=0.9", "'a={teacher.small.finetuned}'", "that teacher is not fine-tuned", "teachers.small"),
    "in an axis": ("[0.1, 0.25]", "['{teacher.huge}']", "many.axes.masks.student_keep_ratio: {teacher.huge} names", ""),
    "of itself": ("finetune: true", "set: ['a={teacher.large}']", "g.yaml:3 teachers.large.set", "must stand above"),
    "for all": ("finetune.yaml}", "f.yaml, set: ['a={teacher.large}']}", "g.yaml:11 finetune.set: {teacher.large}", ""),
    "not YAML": ("[0, 1]", "[0, 1", "g.yaml:", ""),
    "key twice": ("  ten:", "  mae:", "g.yaml:7: mae is given twice", "keep one"),
}


def test_paths_are_found_beside_the_file_and_what_is_common_is_everyone_s(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/g.yaml").write_text(STUDY)
    study = load_study(tmp_path / "studies/g.yaml")
    assert study.out == "runs/x" and study.seeds == (0, 1) and study.baseline == "mae"
    assert list(study.students) == ["scratch", "mae", "ten", "many", "tuned", "plain"]
    assert study.teachers["large"].config == str(tmp_path / "studies/teacher.yaml") and study.teachers["large"].finetune
    assert study.teachers["small"].config == str(tmp_path / "t/s.yaml") and not study.teachers["small"].finetune
    assert study.teachers["small"].set == study.teachers["small"].finetune_set == ()
    assert study.students["ten"].config == str(tmp_path / "other/dmae.yaml")
    assert study.students["ten"].set == ("log.every_steps=5", "align.weight=10")
    assert study.students["ten"].finetune_set == ("optim.ema=0.9", "optim.epochs=2")
    assert study.students["scratch"].config is None and study.students["scratch"].shape_of == "mae"
    assert study.students["mae"].set == ("log.every_steps=5",) and study.students["scratch"].set == ()
    assert study.students["plain"].finetune_set == ("optim.ema=0.9",)
    assert study.students["many"].axes == {"teacher": ("small", "large"), "masks.student_keep_ratio": (0.1, 0.25)}
    assert study.students["tuned"].finetune_axes == {"optim.lr": (1, 2)}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_with_their_place(tmp_path: Path, mistake: str) -> None:
    old, new, cause, remedy = MISTAKES[mistake]
    assert old in STUDY
    (tmp_path / "g.yaml").write_text(STUDY.replace(old, new))
    with pytest.raises(ConfigError) as raised:
        load_study(tmp_path / "g.yaml")
    assert cause in raised.value.cause and remedy in raised.value.remedy, raised.value
    assert "\n" not in raised.value.cause + raised.value.remedy


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load_study(tmp_path / "none.yaml")
