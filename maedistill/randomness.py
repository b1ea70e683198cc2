"""The randomness of a sample as a pure function of (seed, position, stream): a counter hash, no generators, no state.

`bits(seed, positions, stream)` gives the same numbers on a CPU and on a GPU, in one process or in fifty, and after a
restart. Crops, flips and masks each draw from their own stream; the sample order is a keyed permutation built
from the same hash. The mixing function is the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).

    P positions    n draws per position
"""

import math
from enum import IntEnum
from typing import TypeVar

import numpy as np
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
    NOISE = 10
    RESAMPLE = 11


_Words = TypeVar("_Words", int, np.ndarray)
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


def _mix_words(x: _Words) -> _Words:
    """Return `mix` of one word in plain integers, or of an array of uint64."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _WORD
    x = ((x ^ (x >> 27)) * _MIX_2) & _WORD
    return x ^ (x >> 31)


def key(*parts: int) -> int:
    """Absorb integers one after another into one hash word; return it as a signed 64-bit integer."""
    state = 0
    for part in parts:
        state = _mix_words(((state + _GOLDEN) & _WORD) ^ _mix_words((part + _GOLDEN) & _WORD))
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


def normal(seed: int, positions: Tensor, stream: Stream, *, n: int) -> Tensor:
    """Return `n` draws per position from the standard normal distribution (Box & Muller, 1958): float32 [P, n]."""
    words = bits(seed, positions, stream, n=(n + 1) // 2)  # each gives two draws
    radius = (-2 * ((_shift(words, 32).float() + 1) * 2.0**-32).log()).sqrt()  # of a uniform draw in (0, 1]
    angle = (words & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :n]


def permute(x: Tensor, size: int, round_key: int) -> Tensor:
    """Return the image of each `x` under a keyed permutation of {0, ..., size - 1}: int64 [P] -> int64 [P], on the CPU.

    Uses an unbalanced Feistel network (Luby & Rackoff, 1988) over the next power of two, with cycle walking (Black &
    Rogaway, 2002) for values outside the range. Memory is constant; any element is computed without the others.
    """
    assert size >= 1 and x.ndim == 1
    if size == 1:
        return torch.zeros_like(x)
    width = max(2, (size - 1).bit_length())
    round_keys = [_mix_words((round_key + i * _GOLDEN) & _WORD) for i in range(1, 13)]
    image = _feistel(x.numpy().astype(np.uint64), width, round_keys)  # NumPy: its calls cost less than torch's
    while (outside := np.flatnonzero(image >= size)).size:  # each pass leaves fewer than half of them outside
        image[outside] = _feistel(image[outside], width, round_keys)
    return torch.from_numpy(image.view(np.int64))


def _feistel(x: np.ndarray, width: int, round_keys: list[int]) -> np.ndarray:
    """Run Feistel rounds on `width`-bit words in uint64: add a keyed hash of one half to the other, swap the halves."""
    low = width // 2
    high = width - low
    left, right = x >> low, x & ((1 << low) - 1)  # high bits, low bits
    for round_key in round_keys:
        left, right = right, (left + _mix_words(right + round_key)) & ((1 << high) - 1)
        low, high = high, low
    return (left << low) | right
