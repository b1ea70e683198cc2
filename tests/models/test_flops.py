"""FLOPs of a network's forward pass."""

import pytest

from maedistill.models.flops import forward_gflop
from maedistill.models.vits import build_vit


def test_flops_are_those_of_the_formula():
    vit = build_vit("vit_small_patch16_224", image_size=224)
    tokens, width = 197, 384
    block = 24 * tokens * width**2 + 4 * tokens**2 * width  # projections and MLP, attention
    assert forward_gflop(vit) == pytest.approx((12 * block + 2 * 196 * 768 * width) / 1e9, rel=1e-9)
