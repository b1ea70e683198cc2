"""The randomness of a sample as a pure function of (seed, position, stream): a counter hash, no generators, no state.

`bits(seed, positions, stream)` gives the same numbers on a CPU and on a GPU, in one process or in fifty, today or after
a restart. Crops, flips and masks each draw from a stream of their own; the sample order is a keyed permutation built
from the same hash. The mixing function is the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).

    P positions    n draws per position
"""

from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """One independent source of draws per purpose. The values are part of every run's result: never renumber."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    MASK = 4
    REPLACEMENT = 5
    SHARDS = 6
    NETWORK = 7


def _signed(word: int) -> int:
    """A 64-bit word as the two's-complement integer that an int64 tensor holds."""
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, count: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, element by element: a bijection of 64-bit words. int64 products wrap around."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def key(*parts: int | Tensor) -> Tensor:
    """Absorbs integers (or int64 tensors that broadcast) one after another into one hash word each."""
    state = torch.zeros((), dtype=torch.int64)
    for part in parts:
        word = part if isinstance(part, Tensor) else torch.tensor(_signed(part % (1 << 64)))
        state = mix((state.to(word.device) + _GOLDEN) ^ mix(word + _GOLDEN))
    return state


def bits(seed: int, positions: Tensor, stream: Stream, *, n: int) -> Tensor:
    """`n` hash words per position: int64 [P, n], all 64 bits random.

    positions: int64 [P], any device; the result is on the same device.
    """
    counter = torch.arange(n, device=positions.device)
    return key(key(seed, int(stream)).to(positions.device), positions[:, None], counter)  # [P, n]


def uniform(seed: int, positions: Tensor, stream: Stream, *, n: int) -> Tensor:
    """`n` draws per position, uniform in [0, 1) with 53 bits: float64 [P, n]."""
    return _shift(bits(seed, positions, stream, n=n), 11).double() * 2.0**-53


def permute(x: Tensor, size: int, round_key: Tensor) -> Tensor:
    """The image of each `x` under a keyed permutation of {0, ..., size - 1}: int64, the shape of `x`.

    An unbalanced Feistel network (Luby & Rackoff, 1988) over the next power of two, with cycle walking (Black &
    Rogaway, 2002) for what falls outside: constant memory, and any element is found without the others.
    """
    assert size >= 1
    if size == 1:
        return torch.zeros_like(x)
    width = max(2, (size - 1).bit_length())
    round_keys = mix(round_key + torch.arange(1, 13) * _GOLDEN)
    image = _feistel(x, width, round_keys)
    while bool((outside := image >= size).any()):  # fewer than half the words are outside each time
        image = torch.where(outside, _feistel(image, width, round_keys), image)
    return image


def _feistel(x: Tensor, width: int, round_keys: Tensor) -> Tensor:
    """Feistel rounds on `width`-bit words: each adds a keyed hash of one half to the other and swaps the halves."""
    low = width // 2
    high = width - low
    for round_key in round_keys:
        left, right = x >> low, x & ((1 << low) - 1)  # high bits, low bits
        left = (left + mix(round_key + right)) & ((1 << high) - 1)
        x = (right << high) | left
        low, high = high, low
    return x
