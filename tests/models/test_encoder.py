"""The masked walk against timm's own forward, and what it refuses."""

import pytest
import timm
import torch

from maedistill.errors import ConfigError
from maedistill.models.encoder import MaskedEncoder
from maedistill.models.initialize import initialize
from maedistill.models.meta import meta_device
from maedistill.models.vits import build_vit, nearest_models

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


def test_all_patches_in_another_order_only_permutes_the_rows() -> None:
    ours = encoder()
    images, ids = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.stack([torch.randperm(64) for _ in range(2)])
    plain, chosen = ours(images)[0], ours(images, ids)[0]
    permuted = torch.gather(plain[:, 1:], 1, ids[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(chosen[:, 0], plain[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(chosen[:, 1:], permuted, rtol=0, atol=1e-12)


def test_hidden_patches_change_nothing() -> None:
    """What is not chosen is not looked at: garbage there, even NaN, leaves every output as it was."""
    ours, images = encoder(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    spoiled = images.clone()
    spoiled[:, :, :4] = torch.nan  # the first eight patches
    ids = torch.arange(8, 24)[None]
    assert torch.equal(ours(images, ids)[0], ours(spoiled, ids)[0])


def test_no_block_runs_after_the_last_tap() -> None:
    ours = encoder()
    for parameter in ours.vit.blocks[2].parameters():
        parameter.data.fill_(torch.nan)
    last, tapped = ours(torch.randn(1, 3, 32, 32, dtype=torch.float64), taps=(0, 1), to_last_tap=True)
    assert last.isfinite().all() and torch.equal(last, tapped[1]) and set(tapped) == {0, 1}


def test_activation_checkpointing_leaves_gradients_as_they_are() -> None:
    gradients = []
    for recompute in (False, True):
        ours = encoder()
        ours.vit.set_grad_checkpointing(recompute)
        images = torch.linspace(0, 1, 3 * 32 * 32, dtype=torch.float64).view(1, 3, 32, 32)
        ours(images, torch.arange(16)[None])[0].square().sum().backward()
        gradients.append(ours.vit.blocks[0].attn.qkv.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "model",
    ["vit_relpos_small_patch16_224", "beitv2_base_patch16_224", "samvit_base_patch16", "vit_tiny_r_s16_p8_224"],
)
def test_other_kinds_are_refused_by_name(model: str) -> None:
    assert timm.is_model(model)
    with pytest.raises(ConfigError) as refusal:
        build_vit(model, image_size=224)
    assert model in refusal.value.cause and "vit_small_patch16_224" in refusal.value.remedy


def test_a_misspelt_model_gets_the_nearest() -> None:
    with pytest.raises(ConfigError) as refusal:
        build_vit("vit_smal_patch16_224", image_size=224)
    assert "vit_small_patch16_224" in refusal.value.remedy


def test_fixed_positions_are_a_saved_buffer() -> None:
    vit = build_vit("vit_tiny_patch16_224", image_size=32, pos_embed="sincos2d", **TINY)
    assert "pos_embed" in vit.state_dict() and "pos_embed" not in dict(vit.named_parameters())
    learned = build_vit("vit_tiny_patch16_224", image_size=32, **TINY)
    assert "pos_embed" in dict(learned.named_parameters())


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        ({"image_size": 38}, "patch size 16 does not divide image size 38"),
        ({"image_size": 32, "width": 96, "num_heads": 5}, "width 96 .* 5 heads"),
        ({"image_size": 32, "width": 54, "num_heads": 3}, "multiple of 4"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused_for_any_name(overrides: dict, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        build_vit("vit_base_patch16_plus_240", **overrides)


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("vit_tny", "vit_tiny_patch16_224"),
        ("vit_tny_patch16_224", "vit_tiny_patch16_224"),
        ("vit_samll_patch16_224", "vit_small_patch16_224"),
        ("vit_bse", "vit_base_patch16_224"),
        ("deit_smal", "deit_small_patch16_224"),
        ("resnt18", "resnet18"),
    ],
)
def test_the_nearest_name_begins_like_what_was_typed(typed, nearest):
    assert nearest_models(typed, timm.list_models())[0] == nearest


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "resnet18", "convnext_atto"])
def test_the_meta_device_gives_the_shapes_alone(name):
    with meta_device():
        empty = timm.create_model(name, pretrained=False)
        assert torch.ones(3).add_(1).is_meta
    real = timm.create_model(name, pretrained=False)
    shapes = [{key: (value.shape, value.dtype) for key, value in one.state_dict().items()} for one in (empty, real)]
    assert shapes[0] == shapes[1] and all(value.is_meta for value in empty.state_dict().values())
    assert torch.ones(3).add_(1).tolist() == [2, 2, 2]
