"""95 % intervals against scipy, published examples and coverage by simulation."""

import numpy as np
import pytest
from scipy import stats

from maedistill.report.intervals import of_count, of_difference, of_pairs, of_seeds


@pytest.mark.parametrize(("correct", "images"), [(0, 5), (5, 5), (24, 24), (3, 10), (682, 797), (40_900, 50_000)])
def test_a_count_has_wilson_s_interval(correct, images) -> None:
    found, expected = of_count(correct, images), stats.binomtest(correct, images).proportion_ci(method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((correct / images, expected.low, expected.high))
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize("n", [2, 3, 5, 31, 32, 60, 300])
def test_seeds_have_student_s_interval(n) -> None:
    values = np.random.default_rng(n).normal(0.6, 0.01, n)
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)
    found = of_seeds(values.tolist())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=1e-5)
    assert (found.high - found.low) / 2 / half == pytest.approx(1, abs=5e-5), "in units of t"


def test_a_difference_of_two_counts_is_newcombe_s_published_example() -> None:
    found = of_difference(56, 70, 48, 80)  # Newcombe (1998), table II (a), method 10
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_pairs_cover_the_truth_and_are_narrower_than_counts() -> None:
    """Two networks that agree on most of 200 images; their true difference is 0.05."""
    draws = np.random.default_rng(0)
    covered, narrower = 0, 0
    for _ in range(400):
        kind = draws.choice(4, 200, p=[0.75, 0.10, 0.05, 0.10])  # both right, one alone, other alone, none
        one, other = (kind == 0) | (kind == 1), (kind == 0) | (kind == 2)
        paired = of_pairs(one.tolist(), other.tolist())
        counted = of_difference(int(one.sum()), 200, int(other.sum()), 200)
        covered += paired.low <= 0.05 <= paired.high
        narrower += paired.high - paired.low < counted.high - counted.low
        assert paired.value == pytest.approx(counted.value)
    assert 0.93 * 400 <= covered <= 0.985 * 400 and narrower == 400
