"""ImageNet-ReaL: reassessed labels of the validation images, against timm's own evaluator."""

from types import SimpleNamespace

import pytest
import torch
from timm.data import RealLabelsImagenet

from maedistill.data.shards.open_index import open_index
from maedistill.errors import ConfigError, DataError
from maedistill.evaluation.accuracy import Evaluation
from maedistill.evaluation.real_labels import count_real, open_real_labels
from tests.weights.imagenet import make_imagenet


class FakeIndex(SimpleNamespace):
    """As much of a ShardIndex as is asked for."""

    def __init__(self, keys):
        super().__init__(keys=keys, classes=(), key=keys.__getitem__)

    def __len__(self):
        return len(self.keys)

    def sample_name(self, i):
        return f"val.tar:{self.keys[i]}"


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
    with pytest.raises(DataError, match=f"{key} is not an image of ImageNet"):
        open_real_labels(FakeIndex([key]), num_classes=1000)
    with pytest.raises(ConfigError, match="the model has 12"):
        open_real_labels(FakeIndex(["ILSVRC2012_val_00000001"]), num_classes=12)
