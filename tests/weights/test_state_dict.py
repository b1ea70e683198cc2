"""Weight files of others: every key style, nothing lost or made up without being named. Hostile ones: tests/faults."""

import argparse
import hashlib
import os

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from maedistill.errors import DataError
from maedistill.models.initialize import initialize
from maedistill.models.vits import build_vit
from maedistill.weights.from_file import read_weights_file, why_unreadable
from maedistill.weights.state_dict import import_weights, load_encoder
from tests.support.golden import GOLDEN

TINY = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def vit(seed=0, image_size=32, **overrides):
    built = build_vit("vit_tiny_patch16_224", image_size=image_size, **(TINY | overrides))
    initialize(built, seed=seed)
    return built.eval()


def loaded(target, state, **keywords):
    """`state` loaded into `target`; the audit."""
    return load_encoder(target, import_weights(state, name="a file"), name="a file", **keywords)


def refusal(target, state, **keywords) -> str:
    with pytest.raises(DataError) as caught:
        loaded(target, state, **keywords)
    assert caught.value.cause.startswith("a file: ") and caught.value.remedy
    return caught.value.cause


# What each golden file holds; that every value ends up where it belongs is the golden test's business.
HEADS = {"projections.0", "projections.1", "generators.0", "generators.1"}


@pytest.mark.parametrize(
    ("name", "parts", "dropped"),
    [
        ("mae_normpix", {"encoder.vit", "decoder"}, set()),
        ("dmae_L1_student", {"encoder.vit", "decoder", "projections.0"}, set()),
        ("dmae_L1_teacher", {"encoder.vit", "decoder"}, set()),
        ("amd_teacher", {"encoder.vit"}, {"head", "fc_norm"}),
        ("amd_student", {"encoder.vit", "decoder", *HEADS}, {"generators"}),  # its norms, which are never applied
    ],
)
def test_published_key_styles_are_renamed_completely(name, parts, dropped):
    content = read_weights_file(GOLDEN / f"{name}.pth")
    imported = import_weights(content)
    assert not imported.foreign and {key.split(".")[0] for key in imported.dropped} == dropped
    found = {key for key in parts if any(name.startswith(f"{key}.") for name in imported.weights)}
    assert found == parts and all(name.startswith(tuple(parts)) for name in imported.weights)
    tensors = len(content["model"]) - len(imported.dropped) + len(content.get("generator_mask_tokens", []))
    merged = sum(key.endswith("v_bias") for key in content["model"])
    assert len(imported.weights) == tensors - merged


@pytest.mark.parametrize("style", ["timm", "ours", "timm with a head"])
def test_a_loaded_encoder_computes_what_the_file_s_did(style):
    original, target, images = vit(seed=1), vit(seed=2), torch.randn(2, 3, 32, 32)
    state = original.state_dict()
    if style == "ours":
        state = {f"encoder.vit.{k}": v for k, v in state.items()} | {"decoder.mask_token": torch.zeros(1, 1, 8)}
    if style == "timm with a head":
        state |= {"head.weight": torch.zeros(10, 32), "fc_norm.bias": torch.zeros(32)}
    audit = loaded(target, state)
    assert torch.equal(target.forward_features(images), original.forward_features(images))
    assert audit.loaded == len(original.state_dict()) and not audit.absent and not audit.resampled
    unused = {"timm": "", "ours": ", 1 unused (decoder)", "timm with a head": ", 2 unused (fc_norm, head)"}[style]
    assert str(audit) == f"{audit.loaded} keys loaded{unused}"


def test_separate_query_and_value_biases_become_one_with_none_for_keys():
    q, v, state = torch.randn(32), torch.randn(32), vit().state_dict()
    del state["blocks.1.attn.qkv.bias"]
    target = vit(seed=2)
    loaded(target, state | {"blocks.1.attn.q_bias": q, "blocks.1.attn.v_bias": v})
    assert torch.equal(target.blocks[1].attn.qkv.bias.detach(), torch.cat([q, torch.zeros(32), v]))
    assert "blocks.1.attn.qkv.bias is (64,)" in refusal(vit(), state | {"blocks.1.attn.q_bias": q})


def test_patches_of_one_video_frame_are_image_patches_and_of_two_are_not():
    state = vit().state_dict()
    kernel = state["patch_embed.proj.weight"]
    target = vit(seed=2)
    loaded(target, state | {"patch_embed.proj.weight": kernel[:, :, None]})
    assert torch.equal(target.patch_embed.proj.weight.detach(), kernel)
    assert "2 video frames" in refusal(vit(), state | {"patch_embed.proj.weight": torch.stack([kernel, kernel], 2)})


def test_what_does_not_belong_is_named():
    state = vit().state_dict()
    cause = refusal(vit(), state | {"rope.freqs": torch.zeros(3)})
    assert "1 keys belong to no ViT" in cause and "rope.freqs" in cause
    assert "blocks.2." in refusal(vit(), vit(depth=3).state_dict())  # a deeper model than teacher.model says
    assert "blocks.0.ls1.gamma" in refusal(vit(), state | {"blocks.0.ls1.gamma": torch.zeros(32)})
    assert "reg_token" in refusal(vit(), vit(register_tokens=4).state_dict())
    with pytest.raises(DataError) as caught:  # registers that the file lacks
        loaded(vit(register_tokens=4), vit().state_dict())
    assert "reg_token" in caught.value.cause and "teacher.model=vit_base_patch16_224" in caught.value.remedy


def test_what_is_missing_is_named_but_for_a_final_norm_that_nobody_runs():
    state = vit().state_dict()
    shallow = {key: value for key, value in state.items() if not key.startswith("blocks.1.")}
    assert "12 keys are missing, e.g. blocks.1." in refusal(vit(), shallow)
    bare = {key: value for key, value in state.items() if not key.startswith("norm.")}
    assert "norm.weight" in refusal(vit(), bare)
    assert loaded(vit(), bare, optional=("norm.",)).absent == ["norm.weight", "norm.bias"]
    without = {key: value for key, value in state.items() if key != "pos_embed"}
    assert "1 keys are missing, e.g. pos_embed" in refusal(vit(), without, optional=("norm.",))
    fixed = vit(pos_embed="sincos1d")
    table = fixed.pos_embed.clone()
    assert loaded(fixed, without, fixed_positions=True).absent == ["pos_embed"] and torch.equal(fixed.pos_embed, table)


@pytest.mark.parametrize(
    ("overrides", "image_size"),
    [({}, 64), ({"class_token": False}, 16), ({"register_tokens": 3}, 48), ({"patch_size": 4}, 32)],
)
def test_another_grid_or_patch_size_is_resampled_as_timm_does(overrides, image_size):
    kept = {key: value for key, value in overrides.items() if key != "patch_size"}
    state, target = vit(seed=1, **kept).state_dict(), vit(seed=2, image_size=image_size, **overrides)
    audit = loaded(target, state)
    grid = list(target.patch_embed.grid_size)
    prefix = target.num_prefix_tokens
    expected = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=prefix)
    assert torch.equal(target.pos_embed.detach(), expected) and "pos_embed" in audit.resampled
    if "patch_size" in overrides:
        kernel = resample_patch_embed(state["patch_embed.proj.weight"], [4, 4])
        assert torch.equal(target.patch_embed.proj.weight.detach(), kernel)
        assert str(audit).endswith("2 resampled (patch_embed, pos_embed)")


def test_positions_without_rows_for_prefix_tokens_are_resampled_too():
    name = "vit_small_patch14_reg4_dinov2"
    small, large = (build_vit(name, image_size=size, **TINY) for size in (32, 64))
    loaded(large, small.state_dict())
    assert torch.equal(large.pos_embed, resample_abs_pos_embed(small.pos_embed, [8, 8], num_prefix_tokens=0))


def test_arguments_beside_the_weights_are_plain_enough(tmp_path):
    """MAE's training script saves its argparse.Namespace."""
    torch.save({"model": vit().state_dict(), "args": argparse.Namespace(epochs=800)}, tmp_path / "a.pth")
    assert not import_weights(read_weights_file(tmp_path / "a.pth")).foreign


def test_a_file_without_rights_is_not_called_missing(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    save_file(vit().state_dict(), file)
    monkeypatch.setattr(os, "access", lambda path, mode: path != file)  # root may read everything
    with pytest.raises(DataError, match="may not read it"):
        read_weights_file(file)
    said = FileNotFoundError(f"No such file or directory: {file}")  # by safetensors, of such a file
    assert why_unreadable(said) == f"{file} may not be read"
    file.unlink()
    assert why_unreadable(said) == f"there is no {file}"


def test_a_missing_file_another_checksum_and_what_is_no_state_dict_are_refused(tmp_path):
    file = tmp_path / "a.pth"
    with pytest.raises(DataError, match="no such file"):
        read_weights_file(file, sha256="0" * 64)
    torch.save(vit().state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert read_weights_file(file, sha256=digest).keys() == vit().state_dict().keys()
    with pytest.raises(DataError, match=f"its sha256 is {digest}"):
        read_weights_file(file, sha256="0" * 64)
    for content in (torch.zeros(3), [1], {}, {"model": {"epoch": 3}}):
        with pytest.raises(DataError, match="holds"):
            import_weights(content)


def test_all_keys_of_timms_plain_vits_are_known():
    """The names in timm's state dicts are all understood, layer scale, registers and norms before the blocks too."""
    for name in (
        "vit_tiny_patch16_224",
        "deit3_small_patch16_224",
        "vit_base_patch14_reg4_dinov2",
        "vit_base_patch16_clip_224",
    ):
        with torch.device("meta"):
            model = timm.create_model(name)
        imported = import_weights(model.state_dict())
        assert not imported.foreign and len(imported.weights) + len(imported.dropped) == len(model.state_dict())
