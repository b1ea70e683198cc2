"""Order of the samples: map position p of the endless training sequence to (sample, epoch), as a pure function.

With n images and k views per image, position p is view p % k of the image at place (p % nk) // k of epoch p // nk.
An epoch's order is a keyed permutation of the whole set. With `window` shards, it is a permutation of the shards, then
one of the samples inside each window of consecutive shards, so that remote shards need only a cache of limited size. A
window of all shards is the whole set. Neither memory nor the time to jump to a position grows with n: only the list of
shard sizes is kept, and the ids of a subset if training uses one.

    P positions   M shards   n images
"""

import functools

import numpy as np
import torch
from torch import Tensor

from maedistill.randomness import Stream, key, permute

_BLOCK = 4096  # places that are permuted at once; a micro-batch is so small that the calls would be the cost


class SampleOrder:
    """The order of all epochs of a data set.

    starts: int64 [M + 1], the first sample of each shard, then the number of samples n.
    window: shards per window; None for the whole set.
    subset: sorted ids of the samples to train on, int64 [n']; None for all. `num_images` is then n' instead of n.
    """

    def __init__(
        self, starts: np.ndarray, *, seed: int, views: int = 1, window: int | None = None, subset: Tensor | None = None
    ) -> None:
        self.starts = torch.from_numpy(np.asarray(starts, dtype=np.int64))
        self.subset = subset
        if subset is not None:
            assert bool((subset.diff() > 0).all()) and subset[0] >= 0 and subset[-1] < self.starts[-1]
            self.starts = torch.searchsorted(subset, self.starts)  # as if the shards held only the subset
        self.num_images = int(self.starts[-1])
        self.num_shards = len(starts) - 1
        self.seed, self.views = seed, views
        self.window = min(window or self.num_shards, self.num_shards)
        assert self.num_images >= 1 and self.window >= 1
        self._cached: tuple[int, Tensor, Tensor] | None = None  # epoch, and the result of `_shards` for it

    def samples(self, positions: Tensor) -> Tensor:
        """Return the sample ids at the positions: int64 [P] -> int64 [P]."""
        epochs = positions // (self.num_images * self.views)  # [P]
        places = positions % (self.num_images * self.views) // self.views  # [P]
        out = torch.empty_like(places)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            out[here] = self.epoch(epoch, places[here])
        return self.ids_at(out)

    def ids_at(self, places: Tensor) -> Tensor:
        """Return the sample ids at places in the sorted list of all samples or the subset: int64 [P] -> int64 [P]."""
        return places if self.subset is None else self.subset[places]

    def epoch(self, epoch: int, places: Tensor) -> Tensor:
        """Map places in the order of one epoch to places in the sorted list of `ids_at`: int64 [P] -> int64 [P]."""
        if self.window == self.num_shards:
            return _permuted(places, self.num_images, key(self.seed, Stream.ORDER, epoch))
        shards, ends = self._shards(epoch)  # [M], [M]
        window_ends = torch.cat([ends[self.window - 1 :: self.window], ends[-1:]]).unique()
        windows = torch.searchsorted(window_ends, places, right=True)  # [P]
        out = torch.empty_like(places)
        for window in windows.unique().tolist():
            here = windows == window
            first = int(window_ends[window - 1]) if window else 0
            size = int(window_ends[window]) - first
            within = _permuted(places[here] - first, size, key(self.seed, Stream.ORDER, epoch, window))
            at = first + within  # places in the shuffled sequence of whole shards
            shard = torch.searchsorted(ends, at, right=True)
            out[here] = self.starts[shards[shard] + 1] - (ends[shard] - at)
        return out

    def shards_ahead(self, position: int) -> list[int]:
        """Return the shards of the window that holds the position, then those of the next window, in reading order."""
        epoch, place = divmod(position // self.views, self.num_images)
        shards, ends = self._shards(epoch)  # [M], [M]
        first = int(torch.searchsorted(ends, place, right=True)) // self.window * self.window
        following = shards[first + self.window : first + 2 * self.window]
        if not len(following):
            following = self._permuted_shards(epoch + 1)[: self.window]
        return torch.cat([shards[first : first + self.window], following]).tolist()

    def _shards(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return all shards in the order of one epoch, and the place at which each of them ends: both int64 [M]."""
        if self._cached is None or self._cached[0] != epoch:  # cached, as it takes 70 ms with 100,000 shards
            shards = self._permuted_shards(epoch)
            self._cached = epoch, shards, (self.starts[shards + 1] - self.starts[shards]).cumsum(0)
        return self._cached[1:]

    def _permuted_shards(self, epoch: int) -> Tensor:
        return permute(torch.arange(self.num_shards), self.num_shards, key(self.seed, Stream.SHARDS, epoch))


def _permuted(places: Tensor, size: int, round_key: int) -> Tensor:
    """Return `permute` of places that mostly follow each other: int64 [P] -> int64 [P]."""
    blocks, out = places // _BLOCK, torch.empty_like(places)  # [P], [P]
    for block in blocks.unique().tolist():
        here = blocks == block
        out[here] = _permuted_block(block, size, round_key)[places[here] - block * _BLOCK]
    return out


@functools.lru_cache(maxsize=4)  # the blocks of one batch, which may end in the next epoch
def _permuted_block(block: int, size: int, round_key: int) -> Tensor:
    first = block * _BLOCK
    return permute(torch.arange(first, min(first + _BLOCK, size)), size, round_key)


def label_subset(labels: np.ndarray, fraction: float, *, seed: int) -> Tensor:
    """Return the sorted ids of round(fraction * count) samples of each class, at least one: int64 [n'].

    labels: int64 [n], none missing. fraction: in (0, 1], 1 for all. The result is a pure function of the arguments. For
    one seed, subsets are nested: each is the beginning of a fixed shuffle of the class, so the 10 % contain the 1 %.
    """
    assert 0 < fraction <= 1 and labels.min() >= 0
    by_class = np.argsort(labels, kind="stable")  # [n], ascending inside each class
    classes, firsts = np.unique(labels[by_class], return_index=True)
    chosen = []
    for label, members in zip(classes.tolist(), np.split(by_class, firsts[1:]), strict=True):
        count = max(1, round(fraction * len(members)))
        places = permute(torch.arange(count), len(members), key(seed, Stream.SUBSET, label))  # [count]
        chosen.append(torch.from_numpy(members)[places])
    return torch.cat(chosen).sort().values
