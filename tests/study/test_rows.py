"""Axes: every combination is one row, and its name says which."""

import itertools
import re

import pytest

from maedistill.config.document import read_document
from maedistill.study.schema import Student, Study


def test_a_student_without_axes_is_one_row() -> None:
    student = Student(config="m.yaml", set=("a=1",), finetune_set=("b=2",))
    assert student.rows("mae") == [("mae", student)]


def test_every_combination_is_a_row_and_its_settings_are_its_name_s() -> None:
    axes = {"optim.lr": (1e-3, 2e-3), "optim.epochs": (1.5, 20.0, 30.0)}
    rows = dict(Student(init_from="m", finetune_axes=axes, finetune_set=("b=2",)).rows("d"))
    assert len(rows) == 6
    for lr, epochs in itertools.product(*axes.values()):
        row = rows[f"d_lr_{lr}_epochs_{epochs}"]
        assert row.init_from == "m" and row.finetune_axes == {}
        assert row.finetune_set == ("b=2", f"optim.lr={lr}", f"optim.epochs={epochs}")


def test_rows_are_chosen_by_their_name_or_that_of_their_student() -> None:
    students = {"m": Student(config="m.yaml"), "x": Student(init_from="m", finetune_axes={"a.b": (1, 2)})}
    study = Study(out="o", seeds=(0,), students=students, finetune={"config": "f.yaml"})
    for only, expected in (
        (None, ["m", "x_b_1", "x_b_2"]),
        (["x"], ["x_b_1", "x_b_2"]),
        (["x_b_2", "m"], ["m", "x_b_2"]),
    ):
        assert list(study.rows(only)) == expected
    assert study.rows()["x_b_2"].steps("x_b_2", 7) == ("m/seed_7/pretrain", "x_b_2/seed_7/finetune")


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
    [(name, row)] = Student(finetune_axes={"augment.rand_augment": (value,)}).rows("s")
    assert name == f"s_rand_augment_{label}" and re.fullmatch(r"[\w.+-]+", name)

    [(key, text)] = [setting.split("=", 1) for setting in row.finetune_set]
    assert read_document(text, prefix=key) == {key: (value, 1)}
