"""Evaluation on the pretend card: what is looked at stays there, and the host reads only where results are gathered.

`knn_predictions` gathers once per part of the queries, `score_heads` once per part of the features and at its end;
`Predictor` and what looks at a batch never wait. Agreement, calibration and scores per class are worked out on the
host.
"""

from functools import partial

import pytest
import timm
import torch
from torch.utils._python_dispatch import _disable_current_modes

from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform
from maedistill.data.shards.open_index import open_index
from maedistill.evaluation.accuracy import evaluate, score_batch
from maedistill.evaluation.agreement import TwoViews, divergence, evaluate_against
from maedistill.evaluation.calibration import calibrate
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import Predictor
from maedistill.evaluation.knn import knn_counts, knn_predictions
from maedistill.evaluation.linear_probe import ProbeRecipe, fit_heads, score_heads
from maedistill.evaluation.per_class import class_rows
from maedistill.evaluation.scorecard import ScoreSpec, score
from maedistill.evaluation.segmentation import pixel_loss
from maedistill.weights.backbone import Backbone
from tests.device.pretend_card import CARD, Card, value_of

CPU = torch.device("cpu")
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32, "num_classes": 3}


def context(device: torch.device, precision: str = "fp32") -> EvalContext:
    return EvalContext(device, batch=7, workers=0, precision=precision)


def network(*, seed: int = 0) -> torch.nn.Module:
    """A classifier of three classes."""
    with _disable_current_modes():  # to be built is not to be tested, and slow on the card
        torch.manual_seed(seed)
        built = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
        torch.nn.init.normal_(built.head.weight)
        return built


@pytest.fixture
def images(shards):
    """The 24 validation images."""
    index = open_index(f"{shards}/val-*.tar")
    return EvaluationImages(index, torch.arange(len(index)), evaluation_transform(size=32, crop=1.0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_looking_at_a_batch_never_waits(precision):
    """Classifier and other network with chosen columns, features of a backbone, judgement and divergence."""
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 0, -1])
    results = []
    for device in (CPU, CARD):
        with Card() as card:
            viewers = [
                Predictor(module.to(device), context(device, precision=precision), **STATISTICS, columns=columns)
                for module, columns in (
                    (network(), None),
                    (network(seed=1), torch.tensor([2, 0, 1])),
                    (Backbone(network(), block=1, pool="class"), None),
                    (Backbone(network(), block=None, pool="mean"), None),
                )
            ]
            here = pixels.to(device), labels.to(device)
            with card.step():
                mine, theirs, *features = (viewer(here[0]) for viewer in viewers)
                found = [mine, theirs, *features, *score_batch(mine, here[1]), divergence(mine, theirs)]
            assert {tensor.device.index for tensor in found} == {device.index}
            results.append(value_of(found))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_accuracy_is_the_same_and_read_where_results_are_gathered(images):
    results = []
    for device in (CPU, CARD):
        with Card() as card:
            predictor = Predictor(network().to(device), context(device), **STATISTICS)
            found = evaluate(predictor, images, context(device))
        results.append(found)
        waits = {("full_pass.Predictor.__init__", "lift_fresh"), ("full_pass.full_pass", "_to_copy")}
        assert {wait for wait in card.waits if wait[0] not in ("?", "batch._moved")} == (
            waits if device.index else set()
        )
    assert results[0].score == results[1].score and torch.equal(results[0].predictions, results[1].predictions)
    scores, calibrations = zip(
        *((list(class_rows(r, {})), calibrate(r.confidences, r.predictions[:, 0] == r.labels)) for r in results),
        strict=True,
    )
    assert scores[0] == scores[1] and calibrations[0] == calibrations[1] and len(scores[0]) == 3


@pytest.mark.parametrize("place", [CPU, CARD])
def test_a_caller_s_module_is_evaluated_on_the_card_wherever_it_is_and_stays_there(shards, place):
    found = []
    with Card():
        module = network().to(place).train()
        for _ in range(2):
            result = score(ScoreSpec(module, f"{shards}/val-*.tar", latency=False), context(CARD), files={})
            found.append((result["top1_correct"], result["images"]))
            assert {parameter.device.index for parameter in module.parameters()} == {place.index} and module.training
    with Card():
        expected = score(ScoreSpec(network(), f"{shards}/val-*.tar", latency=False), context(CPU), files={})
    assert found == [(expected["top1_correct"], 24)] * 2


def test_agreement_of_two_networks_is_the_same(images):
    results = []
    for device in (CPU, CARD):
        transform = images.transform
        both = EvaluationImages(images.index, images.samples, TwoViews(transform, transform))
        with Card():
            networks = [network(seed=seed).to(device) for seed in (0, 1)]
            predictors = [Predictor(module, context(device), **STATISTICS) for module in networks]
            results.append(evaluate_against(*predictors, both, context(device), sizes=(32, 32))[1])
    assert results[0].metrics() == results[1].metrics() and results[0].images == 24


def test_knn_reads_once_for_each_part_of_the_queries(monkeypatch):
    monkeypatch.setattr("maedistill.evaluation.knn._QUERIES", 8)
    monkeypatch.setattr("maedistill.evaluation.knn._BANK", 10)
    draws = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(30, 6, generator=draws), torch.randn(20, 6, generator=draws)
    truth, labels = torch.randint(4, (30,), generator=draws), torch.randint(4, (20,), generator=draws)
    expected = knn_predictions((bank, truth), queries, ks=(1, 5))
    with Card() as card:
        assert torch.equal(knn_predictions((bank, truth), queries, ks=(1, 5), device=CARD), expected)
        reads = [wait for wait in card.waits if wait[0] == "knn.knn_predictions"]
        assert len(reads) == 3 * 3  # parts: the queries and the labels of the bank go there, the votes come back
        counts = knn_counts((bank, truth), (queries, labels), ks=(1, 5), device=CARD)
    assert counts == (expected == labels).sum(1).tolist()


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_a_linear_probe_waits_only_where_heads_begin_and_are_judged(monkeypatch, optimizer):
    monkeypatch.setattr("maedistill.evaluation.linear_probe._CHUNK", 16)
    draws = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(32, 6, generator=draws), torch.randint(3, (32,), generator=draws)
    recipe, how = ProbeRecipe(2, 8, optimizer), {"rates": (0.3, 3.0), "num_classes": 3}
    expected = fit_heads(rows, labels, recipe, **how, device=CPU)
    with Card() as card:
        heads = fit_heads(rows, labels, recipe, **how, device=CARD)
        assert set(card.waits) == {("linear_probe.fit_heads", "_to_copy")}
        assert len(card.waits) == len([*heads.state_dict()]) + 2 + 2  # heads, features, labels; the order of each epoch
        card.waits.clear()
        scores = score_heads(heads, rows, labels)
        assert set(card.waits) == {("linear_probe.score_heads", "_to_copy")} and len(card.waits) == 9
        weights = value_of(heads.state_dict())
    assert all(torch.equal(weights[name], value) for name, value in expected.state_dict().items())
    assert scores == score_heads(expected, rows, labels)


def test_segmentation_trains_on_the_card_from_maps_that_stay_on_the_host():
    draws = torch.Generator().manual_seed(0)
    maps, masks = torch.randn(12, 3, 4, 6, generator=draws), torch.randint(3, (12, 8, 9), generator=draws)
    masks = masks.to(torch.uint8)
    masks[:, 0] = 255
    how = {"rates": (0.01, 0.1), "num_classes": 3, "loss": partial(pixel_loss, ignore=255), "home": CPU}
    expected = fit_heads(maps, masks, ProbeRecipe(2, 4, "adamw"), **how, device=CPU)
    with Card() as card:
        heads = fit_heads(maps, masks, ProbeRecipe(2, 4, "adamw"), **how, device=CARD)
        assert set(card.waits) == {("linear_probe.fit_heads", "_to_copy")}, "batches go there, nothing is read"
        weights = value_of(heads.state_dict())
    assert all(torch.equal(weights[name], value) for name, value in expected.state_dict().items())
