"""Pixel targets against plain statistics of one patch."""

import statistics

import pytest
import torch

from maedistill.methods.mae import patch_statistics, pixel_target


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
