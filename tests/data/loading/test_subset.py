"""Label subsets: the same share of every class, the smaller inside the larger, decided by the seed."""

import hashlib

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maedistill.data.loading.subset import label_subset


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.sampled_from([0, 1, 2, 7]), min_size=1, max_size=200).map(np.array),
    fractions=st.tuples(st.floats(1e-3, 1), st.floats(1e-3, 1)).map(sorted),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_class_gives_its_share_and_the_smaller_subset_is_in_the_larger(labels, fractions, seed):
    small, large = (label_subset(labels, fraction, seed=seed) for fraction in fractions)
    for fraction, subset in zip(fractions, (small, large), strict=True):
        assert subset.dtype == torch.int64 and bool((subset.diff() > 0).all())
        for label in np.unique(labels):
            expected = max(1, round(fraction * int((labels == label).sum())))
            assert (labels[subset.numpy()] == label).sum() == expected
    assert set(small.tolist()) <= set(large.tolist())
    assert label_subset(labels, 1.0, seed=seed).tolist() == list(range(len(labels)))


def test_the_choice_is_random_in_every_class_and_another_with_another_seed():
    labels = np.arange(20_000) % 2
    subset = label_subset(labels, 0.1, seed=0)
    for label in (0, 1):
        places = subset[subset % 2 == label].double() // 2  # 1000 of 0 ... 9999
        assert abs(places.mean() - 5000) < 4 * 10_000 / (12 * 1000) ** 0.5
        gaps = places.diff()
        assert gaps.mean() > 9 and gaps.std() > 7  # nearly geometric; every tenth would have no spread
    evens, odds = (set((subset[subset % 2 == label] // 2).tolist()) for label in (0, 1))
    assert len(evens & odds) < 200, "classes are shuffled apart"
    assert len(set(subset.tolist()) & set(label_subset(labels, 0.1, seed=1).tolist())) < 400


def test_the_subset_is_the_one_of_every_run_so_far():
    """A change here changes what `seed` means: no older run could be continued or compared with."""
    subset = label_subset(np.arange(3000) // 4 % 10, 0.1, seed=1234)
    assert len(subset) == 300
    assert hashlib.sha256(subset.numpy().tobytes()).hexdigest()[:16] == "8220d81f4ead975b"
