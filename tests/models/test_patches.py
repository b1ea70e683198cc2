"""Patch splits and rows of patches."""

import pytest
import torch

from maedistill.models.masking import PatchSplit, num_visible, random_split
from maedistill.models.patches import gather_rows, patchify, unpatchify


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
