"""Pixel targets of flat patches, and their inverse; tests/test_golden.py has the values."""

import pytest
import torch

from maedistill.methods.mae import patch_statistics, pixel_target


@pytest.mark.parametrize("kind", ["raw", "norm_patch", "norm_patch_channel"])
def test_a_flat_patch_is_finite_and_statistics_invert_the_target(kind: str) -> None:
    rows = torch.full((1, 2, 48), 0.5)
    rows[0, 1] = torch.rand(48)
    target = pixel_target(rows, kind=kind)
    assert target.isfinite().all()
    shift, scale = patch_statistics(rows, kind=kind)
    torch.testing.assert_close(target * scale + shift, rows)
