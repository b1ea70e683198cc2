"""The engine against plain torch: every ZeRO stage, number format and accumulation, on 1 and 2 real processes."""

import itertools
import math

import pytest
import torch

from maedistill.errors import ConfigError
from maedistill.training.engine import Engine, LossScale
from maedistill.training.optim import build_optimizer, parameter_groups
from tests.training.scenarios import ROUNDS

RANKS, STAGES = (1, 2), range(4)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("precision", "accumulation"), ROUNDS)
def test_every_stage_trains_like_plain_torch(runs, ranks, precision, accumulation):
    # Six updates with warm-up, cosine, clipping that bites, and two groups of different weight decay.
    results = runs["first", ranks][0]
    expected, norms = results[f"{precision}/{accumulation}/torch"]
    for zero in STAGES:
        outcome = results[f"{precision}/{accumulation}/{zero}"]
        for name, value in expected.items():
            assert torch.allclose(outcome["final"].weights[name], value, rtol=0, atol=1e-6), (zero, name)
        assert outcome["norms"] == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("ranks", RANKS)
def test_an_update_that_is_not_finite_is_skipped_at_every_stage(runs, ranks):
    for zero, (norms, spoiled, without) in runs["first", ranks][0]["skipped"].items():
        assert [math.isfinite(norm) for norm in norms] == [True, True, False, True], zero
        assert spoiled.scalars["updates"] == without.scalars["updates"] == 3
        for name, value in without.weights.items():
            assert name == "calls" or torch.equal(spoiled.weights[name], value), (zero, name)
        for moment, name in itertools.product(spoiled.moments, spoiled.moments["exp_avg"]):
            assert torch.equal(spoiled.moments[moment][name], without.moments[moment][name]), (zero, moment, name)


@pytest.mark.parametrize("ranks", RANKS)
def test_fp16_finds_its_loss_scale_at_every_stage(runs, ranks):
    outcomes = runs["first", ranks][0]["overflow"]
    for norms, scalars in outcomes.values():
        skipped = sum(not math.isfinite(norm) for norm in norms)
        assert 0 < skipped < len(norms)
        assert scalars["updates"] == len(norms) - skipped
        assert scalars["scale"] < 2.0**17
        assert (norms[-1], scalars) == (pytest.approx(outcomes[0][0][-1], rel=1e-3), outcomes[0][1])


@pytest.mark.parametrize("ranks", RANKS)
def test_deepspeed_understood_every_setting(runs, ranks):
    for zero, taken in runs["first", ranks][0]["settings"].items():
        assert taken == {
            "stage": zero,
            "batch": (12, 4 // ranks),
            "accumulation": 3,
            "clip": 0.05 if zero else 0.0,  # at stage 0 the engine clips
            "bucket": 25_000_000,
            "waits for the device to time steps": False,
            "reduces in": torch.float32,
        }


@pytest.mark.parametrize("ranks", RANKS)
def test_every_group_waits_as_long_as_the_run_allows(runs, ranks):
    for result in runs["first", ranks]:
        limits = result["time limits"]
        assert len(limits) > 1 or ranks == 1  # DeepSpeed opens groups of its own
        assert set(limits) == {60.0}


def test_gradients_are_averaged_bucket_by_bucket_while_the_backward_pass_runs(runs):
    for result in runs["first", 2]:
        found = result["reduction"]
        for mean, expected in zip(found["means"], found["expected"], strict=True):
            assert torch.allclose(mean, expected, rtol=1e-6, atol=1e-9)
        assert found["unused"] is None
        update = ["first weight", *["bucket"] * 6, "first weight", "bucket", "bucket", "bucket"]
        assert found["events"] == update * 2
    means = [result["reduction"]["means"] for result in runs["first", 2]]
    assert all(torch.equal(a, b) for a, b in zip(*means, strict=True))


def test_a_module_with_odd_parts_trains_like_a_plain_one_at_every_stage(run_scenario, tmp_path):
    """Memory formats and numbers without a dimension change no bit; all ranks go on with the statistics of rank 0."""
    first, second = run_scenario("given", tmp_path, ranks=2)
    assert set(first["time limits"]) == {50.0}, "of the second start, also for groups that are open"
    assert first[3, False] == 2 and first[3, True][0] is not None
    for zero in range(3):
        (plain, _), (odd, buffers), (_, other_buffers) = first[zero, True], first[zero, False], second[zero, False]
        for name, value in plain.weights.items():
            assert torch.equal(odd.weights[name].reshape(value.shape), value), (zero, name)
            assert odd.weights[name].is_contiguous()
        for name in ("running_mean", "running_var"):
            name = f"layers.1.{name}"
            assert torch.equal(buffers[name], other_buffers[name]), (zero, name)
            assert torch.equal(buffers[name], odd.weights[name]), (zero, name)


def test_loss_scale_halves_at_once_and_doubles_after_the_interval():
    scale = LossScale(scale=8.0, growth_interval=3)
    history = []
    for finite in (True, True, False, True, True, True, True):
        scale.update(finite=finite)
        history.append(scale.scale)
    assert history == [8, 8, 4, 4, 4, 8, 8]


def test_fp16_without_a_gpu_is_refused():
    module = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(parameter_groups(module, 0.1), lr=0.1, betas=(0.9, 0.95))
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        Engine(module, optimizer, zero=0, precision="fp16", clip=None, micro_batch=1, accumulation=1)


def test_frozen_parameters_are_refused():
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    optimizer = build_optimizer(parameter_groups(module, 0.1), lr=0.1, betas=(0.9, 0.95))
    with pytest.raises(AssertionError, match="bias"):
        Engine(module, optimizer, zero=0, precision="fp32", clip=None, micro_batch=1, accumulation=1)
