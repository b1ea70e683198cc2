"""A counter that ranks share."""

import itertools

import torch

from maedistill.processes import distributed


def test_a_number_is_given_to_one_rank_and_each_counter_begins_anew(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    counters = []
    for _ in range(2):  # the ranks
        monkeypatch.setattr(distributed, "_counters", itertools.count())
        counters.append([distributed.shared_counter() for _ in range(2)])
    (one, later), (other, other_later) = counters
    assert [one(), other(), other(), later(), one(), other_later()] == [0, 1, 2, 0, 3, 1]
