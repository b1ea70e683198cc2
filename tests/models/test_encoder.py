"""The walk against timm's own forward; test_families.py has chosen patches, methods/test_teacher.py the last tap."""

import pytest
import torch

from maedistill.models.encoder import MaskedEncoder
from maedistill.models.initialize import initialize
from maedistill.models.vits import build_vit

TINY = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 4}
VARIANTS = [
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"class_token": False}),
    ("vit_tiny_patch16_224", {"register_tokens": 3, "pos_embed": "learned"}),
    ("vit_tiny_patch16_224", {"pos_embed": "sincos1d"}),
    ("vit_small_patch14_reg4_dinov2", {}),  # layer scale, registers, positions without a class entry
    ("vit_base_patch16_clip_224", {}),  # norm before the blocks
]


def encoder(model: str = "vit_tiny_patch16_224", **overrides) -> MaskedEncoder:
    keywords = {"pos_embed": "sincos2d"} | TINY | overrides
    built = MaskedEncoder(build_vit(model, image_size=32, **keywords)).double().eval()
    initialize(built, seed=1)
    return built


@pytest.mark.parametrize(("model", "overrides"), VARIANTS)
def test_walk_equals_timm_when_nothing_is_masked(model: str, overrides: dict) -> None:
    ours = encoder(model, **overrides)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected, intermediates = ours.vit.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)[0:2]
    tokens, tapped = ours(images, taps=(0, 2))
    torch.testing.assert_close(tokens, ours.vit.forward_features(images), rtol=0, atol=1e-12)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-12)
    for block in (0, 2):
        item = intermediates[block]  # (patches, prefix), or patches alone where there is no prefix
        both = torch.cat([item[1], item[0]], dim=1) if isinstance(item, tuple) else item
        torch.testing.assert_close(tapped[block], both, rtol=0, atol=1e-12)


def test_activation_checkpointing_leaves_gradients_as_they_are() -> None:
    gradients = []
    for recompute in (False, True):
        ours = encoder()
        ours.vit.set_grad_checkpointing(recompute)
        images = torch.linspace(0, 1, 3 * 32 * 32, dtype=torch.float64).view(1, 3, 32, 32)
        ours(images, torch.arange(16)[None])[0].square().sum().backward()
        gradients.append(ours.vit.blocks[0].attn.qkv.weight.grad)
    assert torch.equal(*gradients)
