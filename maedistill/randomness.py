"""The randomness of a sample as a pure function of (seed, position, stream): a counter hash, no generators, no state.

`bits(seed, positions, stream)` gives the same numbers on a CPU and on a GPU, in one process or in fifty, and after a
restart. Crops, flips and masks each draw from their own stream; the sample order is a keyed permutation built
from the same hash. The mixing function is the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).

    P positions    n draws per position
"""

from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """Independent sources of draws, one per purpose. The values determine the results of runs: never renumber."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    MASK = 4
    REPLACEMENT = 5
    SHARDS = 6
    NETWORK = 7
    SUBSET = 8
    AUGMENT = 9


_WORD = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(word: int) -> int:
    """Return a 64-bit word as the two's-complement integer that an int64 tensor holds."""
    return word - (1 << 64) if word >= 1 << 63 else word


def _shift(x: Tensor, count: int) -> Tensor:
    """Shift int64 right logically (torch's own shift is arithmetic)."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser to each element: a bijection of 64-bit words. int64 products wrap around."""
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    """Return `mix` of one word in plain integers."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _WORD
    x = ((x ^ (x >> 27)) * _MIX_2) & _WORD
    return x ^ (x >> 31)


def key(*parts: int) -> int:
    """Absorb integers one after another into one hash word; return it as a signed 64-bit integer."""
    state = 0
    for part in parts:
        state = _mix_int(((state + _GOLDEN) & _WORD) ^ _mix_int((part + _GOLDEN) & _WORD))
    return _signed(state)


def _absorb(state: int | Tensor, part: Tensor) -> Tensor:
    """Absorb an int64 tensor as one more part of a `key`. Integers become kernel arguments, so a GPU is not synced.

    The `| 0` only affects torch.compile: without it, a range plus a constant would become 32-bit indices in Triton,
    and the constant does not fit in 32 bits (torch 2.14).
    """
    golden = _signed(_GOLDEN)
    start = _signed((state + _GOLDEN) & _WORD) if isinstance(state, int) else state + golden
    return mix(mix((part | 0) + golden) ^ start)


def bits(seed: int, positions: Tensor, stream: Stream, *, n: int) -> Tensor:
    """Return `n` hash words per position: int64 [P, n], all 64 bits random.

    positions: int64 [P], any device; the result is on the same device.
    """
    stem = key(key(seed, stream))
    return _absorb(_absorb(stem, positions[:, None]), torch.arange(n, device=positions.device))  # [P, n]


def uniform(seed: int, positions: Tensor, stream: Stream, *, n: int) -> Tensor:
    """Return `n` draws per position, uniform in [0, 1) with 53 bits: float64 [P, n]."""
    return _shift(bits(seed, positions, stream, n=n), 11).double() * 2.0**-53


def permute(x: Tensor, size: int, round_key: int) -> Tensor:
    """Return the image of each `x` under a keyed permutation of {0, ..., size - 1}: int64, the shape of `x`.

    Uses an unbalanced Feistel network (Luby & Rackoff, 1988) over the next power of two, with cycle walking (Black &
    Rogaway, 2002) for values outside the range. Memory is constant; any element is computed without the others.
    """
    assert size >= 1
    if size == 1:
        return torch.zeros_like(x)
    width = max(2, (size - 1).bit_length())
    round_keys = mix(round_key + torch.arange(1, 13) * _signed(_GOLDEN))
    image = _feistel(x, width, round_keys)
    while bool((outside := image >= size).any()):  # each pass leaves fewer than half the words outside
        image = torch.where(outside, _feistel(image, width, round_keys), image)
    return image


def _feistel(x: Tensor, width: int, round_keys: Tensor) -> Tensor:
    """Run Feistel rounds on `width`-bit words: add a keyed hash of one half to the other, then swap the halves."""
    low = width // 2
    high = width - low
    for round_key in round_keys:
        left, right = x >> low, x & ((1 << low) - 1)  # high bits, low bits
        left = (left + mix(round_key + right)) & ((1 << high) - 1)
        x = (right << high) | left
        low, high = high, low
    return x
