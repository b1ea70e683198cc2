"""Subsets of classes by name, and ImageNet-ReaL against timm's own evaluator."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet

from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards
from maedistill.errors import ConfigError, DataError
from maedistill.evaluation.accuracy import Evaluation, evaluate
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import Predictor
from maedistill.evaluation.real_labels import count_real, open_real_labels
from maedistill.weights.class_names import compare_names, subset_columns

SYNSETS = ImageNetInfo().label_names()


class Scores(torch.nn.Module):
    """1,000 logits that depend on an image's colour."""

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))

    def forward(self, images):
        return images.mean((2, 3)) @ self.weight


def make_imagenet(folder, labels, numbers) -> str:
    """Shards of 1 px pictures in the folders of some classes, named as ImageNet's validation images."""
    draws = np.random.default_rng(0)
    for label, number in zip(labels, numbers, strict=True):
        path = folder / "val" / SYNSETS[label] / f"ILSVRC2012_val_{number:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (4, 4, 3), np.uint8)).save(path)
    make_shards(open_folder(folder), folder / "shards")
    return str(folder / "shards/val-*.tar")


def test_a_subset_is_judged_among_its_own_classes(tmp_path):
    """As timm's validate.py does for ImageNet-A and -R: the other logits are left out, labels count in the subset."""
    chosen = [999, 3, 41, 500, 7]
    index = open_index(make_imagenet(tmp_path, chosen * 6, range(1, 31)))
    columns = subset_columns((), index.classes, num_known=1000, model="m")
    assert columns.tolist() == sorted(chosen), "shards number their classes by folder name, as ImageNet does"
    images = EvaluationImages(index, torch.arange(30), evaluation_transform(size=4, crop=1.0))
    context = EvalContext(torch.device("cpu"), batch=7, workers=0)
    predictor = Predictor(Scores(), context, mean=(0.0,) * 3, std=(1.0,) * 3, columns=columns)
    found = evaluate(predictor, images, context)
    pixels, labels, _ = images.__getitems__(list(range(30)))
    logits = Scores()(pixels / 255)[:, sorted(chosen)]  # [30, 5]
    assert torch.equal(found.predictions[:, 0], logits.argmax(1)) and torch.equal(found.labels, labels)
    torch.testing.assert_close(found.losses, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    assert found.score.top5_correct == 30 and 0 < found.score.top1_correct < 30


def test_names_are_wordnet_ids_or_their_words_or_the_models_own():
    words = ImageNetInfo().label_descriptions()
    assert subset_columns((), (words[7], SYNSETS[3]), num_known=1000, model="m").tolist() == [7, 3]
    larger = ImageNetInfo("imagenet-22k").label_names()
    columns = subset_columns((), tuple(SYNSETS[:9]), num_known=len(larger), model="m")
    assert [larger[i] for i in columns] == SYNSETS[:9]
    assert subset_columns(("cat", "dog", "cow"), ("cow", "cat"), num_known=3, model="m").tolist() == [2, 0]


@pytest.mark.parametrize(
    ("known", "given", "number", "error", "cause"),
    [
        ((), ("a",), 7, ConfigError, "m does not name its 7 classes"),
        (("a",), (), 1, ConfigError, "holds no names"),
        (("a", "b"), ("b", "x", "y"), 2, DataError, r"m has no class 'x' \(2 of the shards' 3"),
        ((), ("crane",), 1000, DataError, "has 2 classes called 'crane'"),
    ],
)
def test_names_that_do_not_match_are_refused(known, given, number, error, cause):
    with pytest.raises(error, match=cause):
        subset_columns(known, given, num_known=number, model="m")


def test_reassessed_labels_count_as_timms_evaluator_does():
    """The first 300 validation images, the same shares to the last bit."""
    draws = torch.Generator().manual_seed(0)
    real = RealLabelsImagenet([f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(50_000)])
    first = [real.real_labels[f"ILSVRC2012_val_{i + 1:08d}.JPEG"] for i in range(300)]
    logits = torch.randn(300, 1000, generator=draws)
    for i, labels in enumerate(first):
        if labels and i % 3:
            logits[i, labels[-1]] += 3.0
    real.add_result(logits)
    index = FakeIndex([f"n01440764_ILSVRC2012_val_{i + 1:08d}" for i in range(300)])
    best = logits.topk(5).indices
    evaluation = Evaluation(torch.arange(300), torch.zeros(300).long(), best, torch.ones(300), torch.ones(300))
    score = count_real(evaluation, open_real_labels(index, num_classes=1000))
    assert score.images == sum(bool(labels) for labels in first) < 300
    assert (100 * score.top1, 100 * score.top5) == (
        pytest.approx(real.get_accuracy(1), rel=1e-12),
        pytest.approx(real.get_accuracy(5), rel=1e-12),
    )
    assert 0 < score.top1 < score.top5 < 1


class FakeIndex(SimpleNamespace):
    """As much of a ShardIndex as is asked for."""

    def __init__(self, keys, classes=()):
        super().__init__(keys=keys, classes=classes, key=keys.__getitem__)

    def __len__(self):
        return len(self.keys)

    def sample_name(self, i):
        return f"val.tar:{self.keys[i]}"


def test_shards_of_our_own_keep_the_numbers(tmp_path):
    index = open_index(make_imagenet(tmp_path, [5, 5, 8], [1, 293, 50_000]))
    with pytest.raises(ConfigError, match="the shards name others"):
        open_real_labels(index, num_classes=1000)
    table = RealLabelsImagenet(range(50_000)).real_labels
    labels = open_real_labels(FakeIndex([index.key(i) for i in range(3)]), num_classes=1000)
    expected = {tuple(sorted(table[f"ILSVRC2012_val_{number:08d}.JPEG"])) for number in (1, 293, 50_000)}
    assert {tuple(sorted(found)) for found in labels} == expected


@pytest.mark.parametrize(
    "key", ["cat_1", "ILSVRC2012_val_00050001", "ILSVRC2012_val_000000011", "ILSVRC2012_val_00000000"]
)
def test_other_images_have_no_reassessed_labels(key):
    with pytest.raises(DataError, match=f"{key} is no image of ImageNet"):
        open_real_labels(FakeIndex([key]), num_classes=1000)
    with pytest.raises(ConfigError, match="the model has 12"):
        open_real_labels(FakeIndex(["ILSVRC2012_val_00000001"]), num_classes=12)


def test_another_number_of_classes_is_remarked():
    remark = compare_names((), ("cat", "dog"), num_known=1000, model="timm:x")[0]
    assert "timm:x has 1,000 classes without names, the shards 2" in remark
    assert [compare_names((), names, num_known=2, model="x") for names in (("cat", "dog"), ())] == [[], []]
