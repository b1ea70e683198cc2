"""Entropies of cells: linear networks, whose minimum is known in closed form, and the noise that they are made with."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from maedistill.analysis.concepts import find_concepts
from maedistill.analysis.entropies import (
    LEAST_SIGMA,
    OF_UNIT,
    EntropySpec,
    cell_entropies,
    gaussian,
    with_mean,
)
from tests.support.golden import GOLDEN

GRID, INPUTS = 4, 48  # 16 cells of one pixel with 3 channels


def linear(matrix: torch.Tensor):
    """A x, where the inputs of cell i are columns 3 i to 3 i + 2."""
    return lambda pixels: pixels.flatten(2).mT.flatten(1) @ matrix.T


def orthogonal(seed, ids, step, shape):
    """As many draws as inputs, at right angles: their mean is the expectation, for a linear network."""
    basis = torch.linalg.qr(gaussian(seed, ids, step, (INPUTS, INPUTS)))[0] * math.sqrt(INPUTS)
    return basis.unflatten(2, shape[1:])


def entropies(features, *, images=2, noise=orthogonal, **settings):
    spec = EntropySpec(**{"draws": INPUTS} | settings)
    pixels = torch.rand(images, 3, GRID, GRID, generator=torch.Generator().manual_seed(1))
    return cell_entropies(features, pixels, torch.arange(images), grid=GRID, spec=spec, noise=noise)


def test_the_golden_entropies_of_a_linear_map_are_met():
    with np.load(GOLDEN / "online.npz") as arrays:
        matrix, expected = (torch.from_numpy(arrays[name]) for name in ("linear_map", "cell_entropy_at_mean_-2.8"))
        assert arrays["cell_of_input"].tolist() == [i // 3 for i in range(INPUTS)]
    found, change = entropies(linear(matrix))
    torch.testing.assert_close(found, expected.expand(2, -1), rtol=0, atol=1e-3)
    # at the minimum each of the 16 cells makes an equal part of the change: sigma^2 times the squares of its columns
    one = (2 * (expected[0].double() - OF_UNIT)).exp() * matrix[:, :3].double().square().sum()
    torch.testing.assert_close(change.double(), (16 * one).expand(2), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("target", "least"), [(-3.4, 0.3), (-1.8, 0.3), (-1.8, 0.0)])
def test_entropies_differ_by_half_the_logarithm_of_the_columns_squares_whatever_scale_and_target(target, least):
    """Where some cells are at a bound of sigma (least 0), this holds for the others."""
    draws = torch.Generator().manual_seed(0)
    matrix = torch.randn(20, INPUTS, generator=draws)
    matrix *= (least + torch.rand(16, generator=draws) ** (1 if least else 4)).repeat_interleave(3)
    by_size = -0.5 * matrix.square().sum(0).view(1, 16, 3).sum(2).log()
    expected = with_mean(by_size, target - OF_UNIT) + OF_UNIT
    assert (expected.amax() == OF_UNIT) == (least == 0)
    found, _ = entropies(linear(1e4 * matrix), entropy=target)
    torch.testing.assert_close(found.mean(1), torch.full((2,), target), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, expected.expand(2, -1), rtol=0, atol=1e-3)


def test_noise_of_the_usual_kind_meets_the_same_minimum_within_its_spread():
    with np.load(GOLDEN / "online.npz") as arrays:
        matrix, expected = (torch.from_numpy(arrays[name]) for name in ("linear_map", "cell_entropy_at_mean_-2.8"))
    found, _ = entropies(linear(matrix), images=16, noise=gaussian, draws=32)
    assert (found - expected).square().mean().sqrt() < 0.05
    torch.testing.assert_close(found.mean(0), expected, rtol=0, atol=0.03)  # no bias


def test_what_a_network_reads_are_exactly_its_concepts_and_the_rest_tolerates_equal_noise():
    read = torch.zeros(16, dtype=torch.bool)
    read[[5, 6, 9]] = True
    pattern = read.view(1, 1, GRID, GRID).repeat_interleave(4, -1).repeat_interleave(4, -2)
    weight = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def features(pixels):  # [b, 3, 16, 16], not linear
        return torch.tanh(F.conv2d(pixels * pattern, weight, stride=4)).flatten(1)

    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found, change = cell_entropies(features, pixels, torch.arange(2), grid=GRID, spec=EntropySpec(entropy=-1.0))
    concepts, _ = find_concepts(found[None].numpy(), read.expand(2, -1).numpy())
    assert (concepts[0] == read.numpy()).all() and (change > 0).all()
    assert (found[:, ~read].amax(1) - found[:, ~read].amin(1) < 1e-5).all()
    assert (found >= math.log(LEAST_SIGMA) + OF_UNIT - 1e-5).all() and (found.mean(1) + 1).abs().max() < 1e-5


def test_an_image_without_influence_has_no_change_and_equal_entropies():
    found, change = entropies(lambda pixels: 0 * pixels.flatten(1))
    assert (change == 0).all() and (found + 2.8).abs().max() < 1e-5


def test_the_shift_that_meets_a_mean_keeps_differences_and_bounds():
    values = torch.tensor([[-9.0, -4.0, -3.5, 2.0], [-4.0, -4.0, -4.0, -4.0]])
    met = with_mean(values, -3.0)
    torch.testing.assert_close(met.mean(1), torch.full((2,), -3.0), rtol=0, atol=1e-6)
    assert met[0, 3] == 0 and math.isclose(met[0, 0], math.log(LEAST_SIGMA), abs_tol=1e-6)
    assert math.isclose(met[0, 2] - met[0, 1], 0.5, abs_tol=1e-6)


def test_noise_is_normal_and_a_function_of_seed_image_and_step_alone():
    noise = gaussian(0, torch.arange(20), 3, (50, 3, 5, 5))
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs(noise.pow(4).mean() - 3) < 0.1 and noise.unique().numel() > 0.99 * noise.numel()
    assert torch.equal(gaussian(0, torch.tensor([7]), 3, (50, 3, 5, 5))[0], noise[7])
    flat = noise.flatten(1)
    for other in (flat.roll(1, 0), flat.roll(1, 1), gaussian(1, torch.arange(20), 3, (50, 3, 5, 5)).flatten(1),
                  gaussian(0, torch.arange(20), 4, (50, 3, 5, 5)).flatten(1)):  # fmt: skip
        assert abs((flat * other).mean()) < 0.01


def test_a_gpu_would_compute_without_tf32():
    seen = set()

    def features(pixels):
        seen.add((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return pixels.flatten(1)

    assert torch.backends.cudnn.allow_tf32  # torch's default
    entropies(features, steps=1)
    assert seen == {(False, "highest")} and torch.backends.cudnn.allow_tf32
