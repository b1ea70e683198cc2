"""Label subsets for training with few labels, e.g. with 1 % or 10 % of ImageNet's.

    labels [n], fraction -> sorted sample ids, the same share of every class

n samples
"""

import numpy as np
import torch
from torch import Tensor

from maedistill.randomness import Stream, key, permute


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
