"""The linear probe against scikit-learn, each rate as it would be alone, and the protocol's details."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from maedistill.evaluation.linear_probe import LinearHeads, ProbeRecipe, fit_heads, probe_accuracy, score_heads

CPU = torch.device("cpu")
SETTING = {"num_classes": 6, "device": CPU}


def separable(count, *, seed, noise=1.2):
    """Six classes in 24 dimensions whose scales and offsets differ by orders of magnitude, as those of features do."""
    centres = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(6, (count,), generator=draws)
    rows = centres[labels] + noise * torch.randn(count, 24, generator=draws)
    return rows * torch.logspace(-2, 2, 24) + torch.linspace(-50, 50, 24), labels


@pytest.mark.parametrize(("optimizer", "rates"), [("lars", [0.3, 3.0, 10.0]), ("sgd", [0.01, 0.1])])
def test_the_best_rate_comes_near_logistic_regression(optimizer, rates):
    rows, labels = separable(2048, seed=1)
    val, truth = separable(1000, seed=2)
    heads = fit_heads(rows, labels, ProbeRecipe(20, 128, optimizer), rates=rates, **SETTING)
    scores = score_heads(heads, val, truth)
    mean, std = rows.mean(0), rows.std(0)
    oracle = LogisticRegression(max_iter=500).fit(((rows - mean) / std).numpy(), labels.numpy())
    expected = oracle.score(((val - mean) / std).numpy(), truth.numpy())
    assert 0.7 < expected < 0.99
    assert max(score.top1 for score in scores) == pytest.approx(expected, abs=0.02)


def test_each_rate_is_what_it_would_be_alone_and_again():
    rows, labels = separable(600, seed=1)
    recipe = ProbeRecipe(epochs=3, batch=64)
    together = fit_heads(rows, labels, recipe, rates=[0.1, 1.0, 5.0], **SETTING)
    for i, rate in enumerate(together.rates):
        alone = fit_heads(rows, labels, recipe, rates=[rate], **SETTING)
        assert torch.equal(alone.heads[0].weight, together.heads[i].weight)
        assert torch.equal(alone.norm.running_var, together.norm.running_var)
    assert not torch.equal(together.heads[0].weight, together.heads[1].weight)


def test_lars_adapts_weights_and_not_biases():
    """One update by hand: the warm-up is over at once, the weights move by 0.001 lr |w| in the gradient's direction."""
    rows, labels = separable(256, seed=1)
    start = LinearHeads(24, 6, rates=[1.0])
    after = fit_heads(rows, labels, ProbeRecipe(epochs=1, batch=256), rates=[1.0], **SETTING)
    start.train()
    torch.nn.functional.cross_entropy(start(rows)[0], labels).backward()
    weight, gradient = start.heads[0].weight.detach(), start.heads[0].weight.grad
    expected = weight - 0.001 * weight.norm() / gradient.norm() * gradient
    torch.testing.assert_close(after.heads[0].weight.detach(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(after.heads[0].bias.detach(), -start.heads[0].bias.grad, rtol=0, atol=1e-5)


def test_adamw_takes_rates_as_they_are_for_any_batch():
    """Its first update moves each number by the rate."""
    rows, labels = separable(64, seed=1)
    start = LinearHeads(24, 6, rates=[0.01]).heads[0].weight
    after = fit_heads(rows, labels, ProbeRecipe(1, 64, "adamw"), rates=[0.01], **SETTING).heads[0].weight
    torch.testing.assert_close((after - start).abs(), torch.full_like(start, 0.01), rtol=1e-3, atol=0)


def test_counts_are_those_of_a_plain_loop_and_a_rate_too_large_is_seen_to_diverge():
    rows, labels = separable(500, seed=1, noise=4.0)
    heads = fit_heads(rows, labels, ProbeRecipe(2, 128, "sgd"), rates=[1.0, 1e38], **SETTING)
    sane, broken = score_heads(heads, rows[:301], labels[:301])
    logits = heads(rows[:301])[0]
    best = logits.topk(5).indices
    assert sane.top1_correct == int((best[:, 0] == labels[:301]).sum()) and sane.images == 301
    assert sane.top5_correct == int((best == labels[:301, None]).any(1).sum()) > sane.top1_correct
    assert sane.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels[:301]).item(), rel=1e-5)
    assert math.isfinite(sane.loss) and broken.line() == "diverged" and broken.metrics()["loss"] is None


def test_a_short_probe_is_a_share_and_touches_no_generator():
    rows, labels = separable(1000, seed=1)
    val, truth = separable(500, seed=2)
    state = torch.get_rng_state()
    found = probe_accuracy((rows, labels), (val, truth), device=CPU)
    assert torch.equal(torch.get_rng_state(), state), "a run that is probed must not differ from one that is not"
    assert found == probe_accuracy((rows, labels), (val, truth), device=CPU)
    oracle = LogisticRegression(max_iter=500).fit(((rows - rows.mean(0)) / rows.std(0)).numpy(), labels.numpy())
    expected = oracle.score(((val - rows.mean(0)) / rows.std(0)).numpy(), truth.numpy())
    assert found == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("features", "wanted", "expected"), [(100_000, 4096, 4096), (1000, 4096, 250), (3, 4096, 2)])
def test_a_batch_is_at_most_a_quarter_of_the_features(features, wanted, expected):
    assert ProbeRecipe(1, wanted).fit_batch(features).batch == expected
