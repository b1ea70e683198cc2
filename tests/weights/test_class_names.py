"""Subsets of classes by name."""

import pytest
import torch
from timm.data import ImageNetInfo

from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform
from maedistill.data.shards.open_index import open_index
from maedistill.errors import ConfigError, DataError
from maedistill.evaluation.accuracy import evaluate
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import Predictor
from maedistill.weights.class_names import compare_names, subset_columns
from tests.weights.imagenet import SYNSETS, make_imagenet


class Scores(torch.nn.Module):
    """1,000 logits that depend on an image's colour."""

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))

    def forward(self, images):
        return images.mean((2, 3)) @ self.weight


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
        (("a",), (), 1, ConfigError, "holds no class names"),
        (("a", "b"), ("b", "x", "y"), 2, DataError, r"m has no class 'x' \(2 of the shards' 3"),
        ((), ("crane",), 1000, DataError, "has 2 classes called 'crane'"),
    ],
)
def test_names_that_do_not_match_are_refused(known, given, number, error, cause):
    with pytest.raises(error, match=cause):
        subset_columns(known, given, num_known=number, model="m")


def test_another_number_of_classes_is_remarked():
    remark = compare_names((), ("cat", "dog"), num_known=1000, model="timm:x")[0]
    assert "timm:x has 1,000 classes without names, the shards 2" in remark
    remark = compare_names(("ant", "cat"), ("ant", "dog"), num_known=2, model="timm:x")[0]
    assert (
        "timm:x and the shards have different class names: label 1 is 'cat' in the model, 'dog' in the shards" in remark
    )
    assert [compare_names((), names, num_known=2, model="x") for names in (("cat", "dog"), ())] == [[], []]
