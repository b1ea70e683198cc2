"""The streams of draws, and the keyed permutation. The hash itself is tested with the masks that it makes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maedistill.data.loading.order import SampleOrder
from maedistill.randomness import Stream, key, mix, permute

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def feistel_in_torch(x: torch.Tensor, size: int, round_key: int) -> torch.Tensor:
    """The permutation as it was first written, by which all runs so far were ordered."""
    width = max(2, (size - 1).bit_length())
    image = x
    while True:
        low, high, walked = width // 2, width - width // 2, image
        for one in mix(round_key + torch.arange(1, 13) * GOLDEN):
            left, right = walked >> low, walked & ((1 << low) - 1)
            walked = (right << high) | ((left + mix(one + right)) & ((1 << high) - 1))
            low, high = high, low
        image = walked if image is x else torch.where(image >= size, walked, image)
        if not bool((image >= size).any()):
            return image


def test_streams_keep_their_numbers():
    """They are hashed into every draw: a run could not be continued by a version that numbers them otherwise."""
    names = ["ORDER", "CROP", "FLIP", "MASK", "REPLACEMENT", "SHARDS", "NETWORK", "SUBSET", "AUGMENT"]
    assert [Stream[name].value for name in names] == list(range(1, 10))
    assert len({stream.value for stream in Stream.__members__.values()}) == len(Stream.__members__)


@settings(max_examples=200, deadline=None)
@given(
    size=st.one_of(st.integers(2, 300), st.integers(2, 1 << 50), st.integers(1, 50).map(lambda bits: (1 << bits) + 1)),
    round_key=st.integers(-(1 << 63), (1 << 63) - 1),
    shares=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=50),
)
def test_the_permutation_is_the_one_of_every_run_so_far(size, round_key, shares):
    places = torch.tensor([min(int(share * size), size - 1) for share in shares])
    before = places.clone()
    assert torch.equal(permute(places, size, round_key), feistel_in_torch(places, size, round_key))
    assert torch.equal(places, before)


@settings(max_examples=20, deadline=None)
@given(n=st.sampled_from([4095, 4096, 4097, 9469]), seed=st.integers(0, 2**63 - 1), first=st.integers(0, 20_000))
def test_an_order_made_by_blocks_is_that_of_each_place_alone(n, seed, first):
    positions = torch.arange(first, first + 6000)
    order = SampleOrder(torch.tensor([0, n]).numpy(), seed=seed)
    keys = {epoch: key(seed, Stream.ORDER, epoch) for epoch in range(first // n, (first + 5999) // n + 1)}
    alone = [feistel_in_torch(torch.arange(n), n, keys[epoch]) for epoch in keys]
    assert torch.equal(order.samples(positions), torch.cat(alone)[positions - min(keys) * n])
