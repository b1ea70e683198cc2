"""ViTs by the names of timm: their positions, and the names and shapes that are refused."""

import pytest
import timm

from maedistill.errors import ConfigError
from maedistill.models.vits import build_vit, nearest_models

TINY = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 4}


@pytest.mark.parametrize(
    "model",
    ["vit_relpos_small_patch16_224", "beitv2_base_patch16_224", "samvit_base_patch16", "vit_tiny_r_s16_p8_224"],
)
def test_other_kinds_are_refused_by_name(model: str) -> None:
    assert timm.is_model(model)
    with pytest.raises(ConfigError) as refusal:
        build_vit(model, image_size=224)
    assert model in refusal.value.cause and "vit_small_patch16_224" in refusal.value.remedy


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
        ("facebook/dinov3-vits16", "vit_base_patch16_dinov3"),  # another library's: no name begins like it
    ],
)
def test_the_nearest_name_begins_like_what_was_typed_or_has_a_word_of_it(typed, nearest):
    assert nearest_models(typed, timm.list_models())[0] == nearest
