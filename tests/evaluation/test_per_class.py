"""Scores per class against a loop over images, and worst confusions: pairs, examples, picture."""

import csv
from collections import Counter

import numpy as np
import pytest
import torch

from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform
from maedistill.data.shards.open_index import open_index
from maedistill.evaluation.accuracy import Evaluation
from maedistill.evaluation.per_class import (
    Confusion,
    draw_confusions,
    worst_confusions,
    write_per_class,
)


@pytest.fixture
def evaluation() -> Evaluation:
    """96 images of classes 0 to 6, without one of class 2; class 6 is never wrong."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 3, 4, 5, 6])[torch.randint(6, (96,), generator=draws)]
    predictions = torch.stack([torch.randperm(7, generator=draws)[:5] for _ in range(96)])
    swap = predictions[labels == 6]
    predictions[labels == 6] = torch.cat([torch.full((len(swap), 1), 6), swap.masked_fill(swap == 6, 2)[:, 1:]], dim=1)
    return Evaluation(torch.arange(96), labels, predictions, torch.ones(96), torch.rand(96, generator=draws))


def test_each_class_is_counted_by_itself(evaluation, tmp_path):
    names = {label: f"name, {label}" for label in range(6)}
    write_per_class(tmp_path / "c.csv", evaluation, names)
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = {int(row["class"]): row for row in csv.DictReader(file)}
    assert list(rows) == [0, 1, 3, 4, 5, 6]
    for label, row in rows.items():
        mine = [i for i in range(96) if evaluation.labels[i] == label]
        best = [evaluation.predictions[i].tolist() for i in mine]
        right, among = sum(classes[0] == label for classes in best), sum(label in classes for classes in best)
        assert [int(row[name]) for name in ("images", "correct", "correct5")] == [len(mine), right, among]
        assert float(row["top1"]) == pytest.approx(right / len(mine), abs=1e-6)
        assert float(row["top5"]) == pytest.approx(among / len(mine), abs=1e-6)
        assert float(row["confidence"]) == pytest.approx(evaluation.confidences[mine].double().mean().item(), rel=1e-5)
        assert row["name"] == names.get(label, "")
        wrong = Counter(classes[0] for classes in best if classes[0] != label)
        often = max(wrong.values(), default=0)
        expected = min((said for said, count in wrong.items() if count == often), default="")
        assert (row["wrong_class"], int(row["wrong_images"])) == (str(expected), often)
        assert row["wrong_name"] == names.get(expected, "")
    assert rows[6]["correct"] == rows[6]["images"] and rows[6]["wrong_class"] == ""


def test_the_worst_confusions_are_the_most_frequent_pairs_most_confident_images_first(evaluation):
    labels, said = evaluation.labels.tolist(), evaluation.predictions[:, 0].tolist()
    pairs = Counter((label, other) for label, other in zip(labels, said, strict=True) if label != other)
    found = worst_confusions(evaluation, most=4)
    counts = [len(confusion.ids) for confusion in found]
    assert counts == sorted(pairs.values(), reverse=True)[:4]
    for confusion in found:
        ids = [i for i in range(96) if (labels[i], said[i]) == (confusion.label, confusion.predicted)]
        assert list(confusion.ids) == sorted(ids, key=lambda i: -evaluation.confidences[i])
        assert confusion.images == labels.count(confusion.label)


@pytest.mark.parametrize(("size", "shown"), [(32, 96), (160, 112)])
def test_the_picture_shows_the_images_as_the_network_saw_them(shards, size, shown):
    images = EvaluationImages(
        open_index(str(shards / "train-*.tar")), torch.arange(96), evaluation_transform(size=size, crop=1.0)
    )
    confusions = [Confusion(0, 1, (5, 90, 7), 32), Confusion(2, 0, (8,), 30)]
    sheet = np.asarray(draw_confusions(confusions, images, {0: "naïve 猫", 1: "x" * 200}, examples=2))
    assert sheet.shape == (2 * (112 + 4 + 18), 2 * 116 + 4, 3)
    if size == 32:  # enlarged three times, each pixel as it is
        for row, x, sample in ((0, 0, 5), (0, 1, 90), (1, 0, 8)):
            top, left = row * 134 + 18, 4 + x * 116
            pixels = images.__getitems__([sample])[0][0].permute(1, 2, 0).numpy()
            assert np.array_equal(sheet[top : top + 96 : 3, left : left + 96 : 3], pixels)
    assert (sheet[134 + 18 :, 4 + 116 :] == 255).all(), "no second example of the second pair"
    assert (sheet[18 : 18 + shown, 4 : 4 + shown] < 255).any(axis=(1, 2)).all()


def test_nobody_confused_is_a_picture_too(shards):
    images = EvaluationImages(
        open_index(str(shards / "val-*.tar")), torch.arange(1), evaluation_transform(size=8, crop=1)
    )
    assert np.asarray(draw_confusions([], images, {})).min() < 128
