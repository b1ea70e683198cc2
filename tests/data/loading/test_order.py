"""The order of samples: every sample once per epoch, windows kept, any place reached at once, never changed.

And label subsets: the same share of every class, the smaller inside the larger, decided by the seed.
"""

import hashlib
import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maedistill.data.loading.order import SampleOrder, label_subset


def starts(sizes) -> np.ndarray:
    return np.cumsum([0, *sizes], dtype=np.int64)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=9).filter(any),  # a shard may be empty
    window=st.none() | st.integers(1, 12),
    views=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
    first=st.sampled_from([0, 1, 1000]),
)
def test_every_sample_comes_once_per_epoch_and_its_views_together(sizes, window, views, seed, first):
    order, n = SampleOrder(starts(sizes), seed=seed, window=window, views=views), sum(sizes)
    for epoch in range(first, first + 3):
        positions = torch.arange(epoch * n * views, (epoch + 1) * n * views)
        samples = order.samples(positions).view(n, views)
        assert torch.equal(samples, samples[:, :1].expand(n, views))
        assert samples[:, 0].sort().values.tolist() == list(range(n))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=9).filter(any),
    window=st.none() | st.integers(1, 12),
    views=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_a_subset_is_ordered_as_if_nothing_else_were_in_the_shards(sizes, window, views, seed, data):
    chosen = sorted(data.draw(st.sets(st.integers(0, sum(sizes) - 1), min_size=1)))
    order = SampleOrder(starts(sizes), seed=seed, window=window, views=views, subset=torch.tensor(chosen))
    ends = starts(sizes)
    left = [sum(low <= sample < high for sample in chosen) for low, high in itertools.pairwise(ends)]
    alone = SampleOrder(starts(left), seed=seed, window=window, views=views)
    assert order.num_images == alone.num_images == len(chosen)
    positions = torch.arange(3 * views * len(chosen))
    samples = order.samples(positions)
    assert samples.tolist() == [chosen[place] for place in alone.samples(positions)]
    for epoch in samples.view(3, -1, views):
        assert epoch[:, 0].sort().values.tolist() == chosen


@pytest.mark.parametrize("window", [1, 3, 4])
def test_a_window_is_finished_before_the_next_shards_are_touched(window):
    sizes = [7, 1, 20, 5, 5, 11, 3, 40, 2, 6]
    order, first_samples = SampleOrder(starts(sizes), seed=1, window=window), starts(sizes)
    for epoch in range(4):
        samples = order.samples(torch.arange(epoch * 100, (epoch + 1) * 100)).numpy()
        shards = np.searchsorted(first_samples, samples, side="right") - 1
        begun = [shard for shard, _ in itertools.groupby(sorted(range(10), key=shards.tolist().index))]
        place = 0
        for at in range(0, 10, window):
            part = begun[at : at + window]
            end = place + sum(sizes[shard] for shard in part)
            assert set(shards[place:end]) == set(part)
            place = end
        if window > 1:
            assert len([*itertools.groupby(shards)]) > 2 * len(sizes), "shards of a window are mixed"


def test_epochs_seeds_and_windows_shuffle_differently():
    def first_epochs(**keywords):
        whole = SampleOrder(starts([64] * 16), **({"seed": 0} | keywords)).samples(torch.arange(2 * 1024))
        return [tuple(part.tolist()) for part in whole.split(1024)]

    shuffles = [*first_epochs(), *first_epochs(seed=1), *first_epochs(window=4), *first_epochs(window=1)]
    assert len(set(shuffles)) == 8 and tuple(range(1024)) not in shuffles
    ends = starts([64] * 16)
    opened = {tuple(np.searchsorted(ends, shuffle[::64], side="right").tolist()) for shuffle in shuffles[4:]}
    assert len(opened) == 4, "the order of the shards is shuffled too"


def test_neighbours_are_scattered():
    """A shuffle that moved blocks about would pass as a permutation: distances must be those of a random one."""
    samples = SampleOrder(starts([10_000]), seed=0).samples(torch.arange(10_000)).double()
    assert samples.diff().abs().mean() == pytest.approx(10_000 / 3, rel=0.03)  # E|a - b| of two uniform draws
    assert abs(torch.corrcoef(torch.stack([samples, torch.arange(10_000).double()]))[0, 1]) < 0.03


@pytest.mark.parametrize("window", [None, 16])
def test_any_place_among_a_billion_samples_is_found_at_once(window):
    """A list of a billion samples would take 8 GB and most of a minute."""
    order = SampleOrder(starts([1_000_000] * 1000), seed=0, window=window)
    seconds = []
    for epoch in range(123, 133):
        positions = 10**9 * epoch + 987_654_321 + torch.arange(256)
        begin = time.perf_counter()
        order.samples(positions)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.1  # 1 to 2 ms where nothing else runs
    samples = order.samples(10**9 * 123 + 987_654_321 + torch.arange(4096))
    assert samples.unique().numel() == 4096 and samples.min() >= 0 and samples.max() < 10**9
    reached = (samples // 1_000_000).unique().numel()
    assert reached > 900 if window is None else reached <= window


def test_the_order_is_the_one_of_every_run_so_far():
    """A change here changes what `seed` means: no older run could be continued or repeated."""
    digest = hashlib.sha256()
    for window, views in ((None, 1), (None, 3), (2, 1), (1, 2)):
        order = SampleOrder(starts([5, 9, 1, 30, 2]), seed=1234, window=window, views=views)
        digest.update(order.samples(torch.arange(1000)).numpy().tobytes())
    assert digest.hexdigest() == "0d4d3fac2aabc593e88d9b55e3425a44cb892acca025281113301dfdf2d05909"


@pytest.mark.parametrize(("window", "subset"), [(1, None), (2, None), (3, torch.arange(0, 23, 2)), (None, None)])
def test_shards_ahead_hold_what_comes_next(window, subset):
    """The shard of a position is among the first `window` that are named, and named at the position before."""
    first_samples = np.array([0, 5, 6, 13, 20, 23])
    order = SampleOrder(first_samples, seed=3, window=window, subset=subset)
    count = window or 5
    for position in range(2 * order.num_images):
        sample = int(order.samples(torch.tensor([position])))
        shard = int(np.searchsorted(first_samples, sample, side="right")) - 1
        ahead = order.shards_ahead(position)
        assert shard in ahead[:count] and shard in order.shards_ahead(max(0, position - 1))


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
        assert abs(places.mean() - 5000) < 4 * 10_000 / (12 * 1000) ** 0.5  # 4 deviations of a mean of 1000 draws
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
