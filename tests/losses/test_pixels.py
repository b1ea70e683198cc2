"""Pixel targets against plain statistics of one patch."""

import statistics

import pytest
import torch

from maedistill.losses.pixels import patch_statistics, pixel_loss, pixel_target
from maedistill.models.patches import patchify, unpatchify


def test_targets_have_the_papers_statistics() -> None:
    rows = torch.rand(2, 3, 48, generator=torch.Generator().manual_seed(0))
    pixels = rows[1, 2].tolist()
    centre, variance = statistics.fmean(pixels), statistics.variance(pixels)
    expected = [(x - centre) / (variance + 1e-6) ** 0.5 for x in pixels]
    torch.testing.assert_close(pixel_target(rows, kind="norm_patch")[1, 2], torch.tensor(expected))
    for channel in range(3):
        values = pixels[channel::3]
        centre, deviation = statistics.fmean(values), statistics.stdev(values)
        expected = [(x - centre) / (deviation + 1e-6) for x in values]
        found = pixel_target(rows, kind="norm_patch_channel")[1, 2, channel::3]
        torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(pixel_target(rows, kind="raw"), rows)


@pytest.mark.parametrize("kind", ["raw", "norm_patch", "norm_patch_channel"])
def test_a_flat_patch_is_finite_and_statistics_invert_the_target(kind: str) -> None:
    rows = torch.full((1, 2, 48), 0.5)
    rows[0, 1] = torch.rand(48)
    target = pixel_target(rows, kind=kind)
    assert target.isfinite().all()
    shift, scale = patch_statistics(rows, kind=kind)
    torch.testing.assert_close(target * scale + shift, rows)


def test_pixel_loss_is_the_mean_square() -> None:
    a, b = torch.rand(2, 3, 48), torch.rand(2, 3, 48)
    torch.testing.assert_close(pixel_loss(a, b), ((a - b) ** 2).sum() / a.numel())


def test_patches_are_in_raster_order_with_channels_last_and_unpatchify_inverts() -> None:
    images = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8)
    rows = patchify(images, 4)
    assert rows.shape == (2, 4, 48)
    assert rows[1, 2, 3 * (1 * 4 + 2) + 1] == images[1, 1, 4 + 1, 2]  # patch (1, 0), pixel (1, 2), channel 1
    assert torch.equal(unpatchify(rows, 4), images)
