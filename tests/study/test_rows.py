"""Axes: every combination is one row, its name says which, and rows that begin alike share their pre-training."""

import itertools
import re

import pytest

from maedistill.config.document import read_document
from maedistill.study.rows import all_pretrainings, all_rows, number_of_rows
from maedistill.study.schema import Student


def test_a_student_without_axes_is_one_row() -> None:
    students = {
        "mae": Student(config="m.yaml", set=("a=1",)),
        "scratch": Student(shape_of="mae", finetune_set=("b=2",)),
    }
    (name, row), (last, other) = all_rows(students)
    assert (name, row.student, row.pretraining, row.finetune_set) == ("mae", "mae", "mae", ())
    assert (last, other.pretraining, other.shape_of, other.finetune_set) == ("scratch", None, "mae", ("b=2",))
    [(trained, way)] = all_pretrainings(students)
    assert (trained, way.config, way.set, way.teacher) == ("mae", "m.yaml", ("a=1",), None)
    assert all(number_of_rows(student) == 1 for student in students.values())


def test_every_combination_is_a_row_and_its_settings_are_its_name_s() -> None:
    axes = {"teacher": ("small", "large"), "masks.student_keep_ratio": (0.1, 0.25, 0.5)}
    tuned = {"optim.lr": (1e-3, 2e-3), "optim.epochs": (1.5, 20.0)}
    student = Student(config="d.yaml", set=("a=1",), axes=axes, finetune_axes=tuned, finetune_set=("b=2",))
    trained, rows = dict(all_pretrainings({"d": student})), dict(all_rows({"d": student}))
    assert len(trained) == 6 and len(rows) == number_of_rows(student) == 24
    for teacher, visible in itertools.product(*axes.values()):
        start = f"d_teacher_{teacher}_student_keep_ratio_{visible}"
        assert trained[start].teacher == teacher and trained[start].set == (
            "a=1",
            f"masks.student_keep_ratio={visible}",
        )
        for lr, epochs in itertools.product(*tuned.values()):
            row = rows[f"{start}_lr_{lr}_epochs_{epochs}"]
            assert row.pretraining == start and row.student == "d"
            assert row.finetune_set == ("b=2", f"optim.lr={lr}", f"optim.epochs={epochs}")


def test_rows_of_another_s_pre_training_train_nothing_before() -> None:
    students = {"m": Student(config="m.yaml"), "x": Student(pretraining_of="m", finetune_axes={"a.b": (1, 2)})}
    assert [name for name, _ in all_pretrainings(students)] == ["m"]
    assert [(name, row.pretraining) for name, row in all_rows(students)] == [("m", "m"), ("x_b_1", "m"), ("x_b_2", "m")]


def test_two_keys_that_end_alike_are_named_in_full() -> None:
    axes = {"align.weight": (5,), "generate.weight": (2,), "optim.clip": (None,)}
    (name, _), *_ = all_rows({"s": Student(config="a.yaml", axes=axes)})
    assert name == "s_align.weight_5_generate.weight_2_clip_null"


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (-1, "-1"),
        (1e16, "1e+16"),
        (True, "true"),
        ([2, 3], "2-3"),
        ([], ""),
        ("mse", "mse"),
        ("a/b: c", "a-b-c"),
        ("1e-3", "1e-3"),
        ("{teacher.small_early.finetuned}", "small_early.finetuned"),
        (["{teacher.a}", "timm:resnet18"], "a-timm-resnet18"),
    ],
)
def test_values_are_folder_names_and_the_settings_mean_the_value(value, label) -> None:
    [(name, row)] = all_rows({"s": Student(finetune_axes={"augment.rand_augment": (value,)})})
    assert name == f"s_rand_augment_{label}" and re.fullmatch(r"[\w.+-]+", name)

    [(key, text)] = [setting.split("=", 1) for setting in row.finetune_set]
    assert read_document(text, prefix=key) == {key: (value, 1)}
