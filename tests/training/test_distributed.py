"""Collectives on one and on two processes."""

import pytest
import torch


@pytest.mark.parametrize("ranks", [1, 2])
def test_collectives(runs, ranks):
    for rank in range(ranks):
        got = runs["first", ranks][rank]["collectives"]
        assert got["sum"] == {"a": ranks * (ranks - 1) / 2, "b": ranks * (1 + 2e-8)}  # float64: 2e-8 is lost in float32
        assert torch.equal(got["rows"], torch.arange(6).view(3, 2))  # 3 rows of rank 0, none of rank 1
        assert got["object"] == {"rank": 0}
        assert got["on_main"] == 0
        assert torch.equal(got["tensor"], torch.arange(3))


def test_a_failure_on_rank_0_reaches_every_rank(runs):
    told = [runs["first", 2][rank]["collectives"]["errors"] for rank in range(2)]
    assert told[0] == [("DataError", "a cause\na remedy"), ("KeyError", "'name'")]
    assert told[1][0] == ("DataError", "a cause\na remedy")
    assert told[1][1] == ("PeerError", "rank 0 failed: KeyError: 'name'\nsee rank 0's traceback")
