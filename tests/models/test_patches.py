"""Patch splits, rows of patches, and the counter hash behind the splits."""

import numpy as np
import pytest
import torch

from maedistill.models.masking import PatchSplit, num_visible, random_split
from maedistill.models.patches import gather_rows, patchify, unpatchify
from maedistill.randomness import Stream, bits, key, mix, permute, uniform

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


def test_split_is_nested_and_covers_all_patches() -> None:
    split = random_split(torch.arange(100), seed=0, num_patches=64, num_student=16, num_teacher=32)
    assert torch.equal(split.order.sort(dim=1).values, torch.arange(64).expand(100, -1))
    assert torch.equal(split.teacher[:, :16], split.student)
    assert torch.equal(torch.cat([split.student, split.hidden], 1), split.order)
    visible = torch.zeros(100, 64).scatter_(1, split.student, 1.0).mean(0)
    assert visible.min() > 0.05 and visible.max() < 0.5  # 0.25 +- 4.6 deviations: no patch is preferred


def test_impossible_splits_are_refused() -> None:
    order = torch.arange(8).expand(2, -1)
    for cuts in ((0, 4), (5, 4), (4, 9)):
        with pytest.raises(AssertionError):
            PatchSplit(order, *cuts)


def test_num_visible_and_gather_rows() -> None:
    assert num_visible(0.25, 196) == 49 and num_visible(0.5, 196) == 98 and num_visible(0.05, 196) == 10
    rows = torch.arange(12).view(1, 4, 3)
    assert gather_rows(rows, torch.tensor([[3, 0], [1, 1]])).tolist() == [
        [[9, 10, 11], [0, 1, 2]],
        [[3, 4, 5], [3, 4, 5]],
    ]


def test_patches_are_in_raster_order_with_channels_last_and_unpatchify_inverts() -> None:
    images = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8)
    rows = patchify(images, 4)
    assert rows.shape == (2, 4, 48)
    assert rows[1, 2, 3 * (1 * 4 + 2) + 1] == images[1, 1, 4 + 1, 2]  # patch (1, 0), pixel (1, 2), channel 1
    assert torch.equal(unpatchify(rows, 4), images)
