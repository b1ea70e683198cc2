"""Two classifiers against each other: each is shown its own view of an image, KL as torch computes it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform
from maedistill.data.shards.open_index import open_index
from maedistill.errors import ConfigError, NumericsError
from maedistill.evaluation.accuracy import evaluate
from maedistill.evaluation.agreement import TwoViews, divergence, evaluate_against
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import Predictor

CONTEXT = EvalContext(torch.device("cpu"), batch=11, workers=0)
INPUTS = {
    "student": (16, {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}, {"crop": 0.8}),
    "teacher": (24, {"mean": (0.1, 0.1, 0.1), "std": (1.0, 0.5, 1.0)}, {"crop": 0.5, "interpolation": "bilinear"}),
}


class Linear(nn.Module):
    """Logits of all pixels of an image of one size."""

    def __init__(self, size, num_classes=7, scale=0.02):
        super().__init__()
        self.register_buffer("weight", scale * torch.randn(3 * size * size, num_classes))

    def forward(self, images):
        assert not self.training
        return images.flatten(1) @ self.weight


def compare(shards, networks):
    predictors = [Predictor(networks[name], CONTEXT, **INPUTS[name][1]) for name in INPUTS]
    views = TwoViews(*(evaluation_transform(size=size, **how) for size, _, how in INPUTS.values()))
    images = EvaluationImages(open_index(str(shards / "train-*.tar")), torch.arange(95), views)
    return evaluate_against(*predictors, images, CONTEXT, sizes=(16, 24))


def test_each_network_sees_what_it_would_see_alone(shards):
    torch.manual_seed(0)
    networks = {"student": Linear(16).train(), "teacher": Linear(24).train()}
    evaluation, agreement = compare(shards, networks)
    assert networks["student"].training and networks["teacher"].training
    logits, alone = [], []
    for name, (size, statistics, how) in INPUTS.items():
        images = EvaluationImages(
            open_index(str(shards / "train-*.tar")), torch.arange(95), evaluation_transform(size=size, **how)
        )
        alone.append(evaluate(Predictor(networks[name], CONTEXT, **statistics), images, CONTEXT))
        mean, std = (torch.tensor(statistics[part]).view(3, 1, 1) for part in ("mean", "std"))
        logits.append(networks[name].eval()((images.__getitems__(list(range(95)))[0] / 255 - mean) / std))
    for name in ("ids", "labels", "predictions", "losses", "confidences"):
        assert torch.equal(getattr(evaluation, name), getattr(alone[0], name)), name
    assert agreement.same == int((logits[0].argmax(1) == logits[1].argmax(1)).sum()) and 0 < agreement.same < 95
    assert agreement.teacher_top1 == alone[1].score.top1_correct
    expected = F.kl_div(
        logits[0].double().log_softmax(1), logits[1].double().log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert agreement.kl == pytest.approx(float(expected), rel=1e-4) and agreement.kl > 0.1


def test_a_network_agrees_with_itself_wholly():
    logits = torch.randn(50, 9)
    assert divergence(logits, logits).eq(0).all()
    assert divergence(logits, logits + 5).abs().max() < 1e-6, "a shift of all logits changes no probability"


def test_other_classes_and_broken_teachers_are_refused(shards):
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="7 classes and the one of --against 5"):
        compare(shards, {"student": Linear(16), "teacher": Linear(24, num_classes=5)})
    with pytest.raises(NumericsError, match="predictions for 95 of 95 images"):
        compare(shards, {"student": Linear(16), "teacher": Linear(24, scale=float("nan"))})
