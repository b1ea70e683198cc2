"""The architecture of a weights file, read off its shapes: what is found equals what was saved, and what is refused."""

import pytest
import timm
import torch

from maedistill.errors import ConfigError, UserError
from maedistill.models.initialize import initialize
from maedistill.models.vits import build_vit
from maedistill.weights.from_file import EncoderSpec
from maedistill.weights.open_network import open_network
from maedistill.weights.recognize import grid_of, recognize

SHAPES = {
    "own": {"width": 128, "depth": 3, "num_heads": 2, "patch_size": 8},
    "no class token": {"width": 64, "depth": 1, "num_heads": 1, "patch_size": 16, "class_token": False},
    "registers": {"width": 64, "depth": 2, "num_heads": 1, "patch_size": 16, "register_tokens": 3},
    "narrow mlp": {"width": 128, "depth": 1, "num_heads": 2, "patch_size": 16, "mlp_ratio": 2.5},
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_file_opens_as_the_network_that_was_saved(tmp_path, case):
    vit = build_vit("vit_small_patch16_224", image_size=48, **SHAPES[case])
    initialize(vit, seed=1)
    torch.save({"model": vit.state_dict() | {"head.weight": torch.zeros(5, 8)}}, tmp_path / "a.pth")
    opened = open_network(f"{tmp_path}/a.pth", "encoder")
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(opened.module.eval().forward_features(images), vit.eval().forward_features(images))
    assert (opened.size, opened.own_size) == (48, 48) and "heads assumed" in opened.describe()
    larger = open_network(f"file:{tmp_path}/a.pth", "encoder", image_size=96, spec=EncoderSpec(), section="init")
    assert (larger.size, larger.own_size) == (96, 48)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_base_patch14_dinov2", "vit_large_patch16_224", "vit_huge_patch14_224"]
)
def test_timms_sizes_have_timms_heads(name):
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=0)
    if "dinov2" in name:  # it has LayerScale, which only its name tells
        with pytest.raises(ConfigError, match=r"no blocks\.0\.ls1\.gamma.*\n.*teacher\.model="):
            recognize(vit.state_dict(), [], name="x", section="teacher")
        return
    found = recognize(vit.state_dict(), [], name="x", section=None)
    assert (found.width, found.depth, found.patch_size) == (
        vit.embed_dim,
        len(vit.blocks),
        vit.patch_embed.patch_size[0],
    )
    assert found.num_heads == vit.blocks[0].attn.num_heads and grid_of(vit.state_dict()) == vit.patch_embed.grid_size[0]


def state(**shape):
    return build_vit(
        "vit_small_patch16_224", image_size=32, **{"width": 64, "depth": 2, "num_heads": 1} | shape
    ).state_dict()


@pytest.mark.parametrize(
    ("weights", "cause", "remedy"),
    [
        (state(width=100, num_heads=2), "a width of 100", "student.num_heads"),
        (state() | {"norm_pre.weight": torch.zeros(64)}, "no norm_pre.weight", "student.model="),
        (state() | {"pos_embed": torch.zeros(1, 4, 64)}, "do not count", "student.model="),
        ({k: v for k, v in state().items() if "blocks.0." not in k}, "missing", "student.model="),
        ({}, "missing", "student.model="),
        (state() | {"patch_embed.proj.weight": torch.zeros(64, 3, 16, 8)}, "square", "student.model="),
        (state() | {"blocks.0.mlp.fc1.weight": torch.zeros(33, 64)}, "other widths", "student.model="),
    ],
)
def test_what_shapes_do_not_tell_is_refused_with_the_key_to_set(weights, cause, remedy):
    with pytest.raises(ConfigError) as caught:
        recognize(weights, [], name="x", section="init")
    assert cause in caught.value.cause and remedy in caught.value.remedy


@pytest.mark.parametrize(("model", "example"), [("resnet18", None), ("eva02_base_patch14_224", "eva02_base")])
def test_a_file_of_another_kind_is_sent_to_a_source_that_takes_it(tmp_path, model, example):
    shape = {"depth": 1} if example else {}
    torch.save(timm.create_model(model, num_classes=0, **shape).state_dict(), tmp_path / "a.pth")
    for named in (None, "vit_base_patch16_224"):  # whatever a user has tried, the remedy names the other sources
        with pytest.raises(UserError) as caught:
            open_network(f"file:{tmp_path}/a.pth", "teacher", spec=EncoderSpec(named), section="teacher")
        assert "timm:NAME" in caught.value.remedy and "local-dir:FOLDER" in caught.value.remedy
        assert named or (f"teacher.model={example}" in caught.value.remedy) == (example is not None)


@pytest.mark.parametrize(("width", "names", "lines"), [(384, "momentum", 1), (384, "other", 0), (768, "momentum", 0)])
def test_the_heads_of_moco_are_doubted(tmp_path, width, names, lines):
    """Its ViT-S has 12, where everybody else's has 6."""
    entries = {prefix: state(width=width, num_heads=6) for prefix in ("base_encoder", f"{names}_encoder")}
    torch.save(
        {f"{prefix}.{key}": value for prefix in entries for key, value in entries[prefix].items()}, tmp_path / "a"
    )
    assert open_network(f"file:{tmp_path}/a", weights="base_encoder").audit.count("MoCo") == lines


def test_heads_that_are_stated_are_not_assumed(tmp_path):
    torch.save(state(width=100, num_heads=2), tmp_path / "a.pth")
    opened = open_network(f"file:{tmp_path}/a.pth", "encoder", spec=EncoderSpec(num_heads=2), section="teacher")
    assert opened.module.blocks[0].attn.num_heads == 2 and "assumed" not in opened.audit
    with pytest.raises(UserError):
        open_network(f"file:{tmp_path}/a.pth", "encoder", spec=EncoderSpec(num_heads=2, width=64), section="teacher")
