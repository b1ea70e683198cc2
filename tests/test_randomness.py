"""The hash behind all draws, their streams, and the keyed permutation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maedistill.data.loading.order import SampleOrder
from maedistill.randomness import Stream, bits, key, mix, normal, permute, uniform

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
WORD = (1 << 64) - 1


def splitmix64(x: int) -> int:
    """The finaliser in plain integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def test_mix_is_splitmix64_on_signed_words() -> None:
    words = [0, 1, 2**63 - 1, 2**63, WORD, 123456789123456789]
    signed = torch.tensor([word - (1 << 64) if word >> 63 else word for word in words])
    assert [int(value) & WORD for value in mix(signed)] == [splitmix64(word) for word in words]


def test_draws_depend_on_seed_position_stream_and_nothing_else() -> None:
    positions = torch.arange(64)
    drawn = bits(3, positions, Stream.CROP, n=5)
    assert torch.equal(drawn[17:20], bits(3, torch.tensor([17, 18, 19]), Stream.CROP, n=5))
    assert torch.equal(drawn[:, :3], bits(3, positions, Stream.CROP, n=3))
    others = [bits(4, positions, Stream.CROP, n=5), bits(3, positions, Stream.FLIP, n=5)]
    others.append(bits(3, positions + 64, Stream.CROP, n=5))
    assert not any((drawn == other).any() for other in others)


def test_the_values_of_the_hash_never_change() -> None:
    """Runs are continued by later versions: these numbers are part of the format."""
    words = [-2838072389597146037, 4444431679538266395, -5855458863223403433, -7177140336674051380]
    assert bits(7, torch.tensor([0, 10**12]), Stream.MASK, n=2).flatten().tolist() == words
    draws = normal(7, torch.tensor([0, 10**12]), Stream.NOISE, n=2).flatten().tolist()
    assert draws == pytest.approx([0.0244953409, 0.6526374221, -0.5733810067, -0.7989419699], rel=1e-6)
    assert permute(torch.arange(12), 12, key(1, 2, 3)).tolist() == [11, 10, 6, 1, 7, 3, 4, 2, 8, 9, 0, 5]


def test_uniform_is_uniform_and_uncorrelated() -> None:
    drawn = uniform(0, torch.arange(200_000), Stream.CROP, n=2).numpy()
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn[:, 0], bins=64, range=(0, 1))[0]
    assert ((counts - 3125) ** 2 / 3125).sum() < 110  # chi-square, 63 degrees of freedom: 1 in 5000
    neighbours = np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1], np.corrcoef(drawn.T)[0, 1]
    assert max(map(abs, neighbours)) < 0.01


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 100, 1797, 45_000])
def test_permute_is_a_permutation_that_its_key_decides(size: int) -> None:
    image = permute(torch.arange(size), size, key(0, size))
    assert torch.equal(image.sort().values, torch.arange(size))
    if size >= 64:
        other = permute(torch.arange(size), size, key(1, size))
        assert (image == other).float().mean() < 0.1
        assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 5 / size**0.5


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
    names = ["ORDER", "CROP", "FLIP", "MASK", "REPLACEMENT", "SHARDS", "NETWORK", "SUBSET", "AUGMENT", "NOISE"]
    numbers = {name: number for number, name in enumerate([*names, "RESAMPLE"], 1)}
    assert {name: stream.value for name, stream in Stream.__members__.items()} == numbers


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
