"""Features of any timm network at any depth, against timm's own walk; what there is not is refused."""

import pytest
import timm
import torch
from timm.models import save_for_hf

from maedistill.errors import ConfigError
from maedistill.weights.backbone import open_backbone, open_dense
from maedistill.weights.from_file import EncoderSpec
from maedistill.weights.open_network import open_network

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.2,) * 3, "crop_pct": 0.9}
SHAPES = {
    "class token": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}),
    "registers": (
        "vit_tiny_patch16_224",
        {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "reg_tokens": 2, "global_pool": "avg"},
    ),
    "patches only": (
        "vit_tiny_patch16_224",
        {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "class_token": False, "global_pool": "avg"},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small networks of several kinds, with random weights, as timm saves them."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("networks")
    for name, (model, arguments) in SHAPES.items():
        arguments = {"img_size": 32, **arguments}
        save(timm.create_model(model, num_classes=5, **arguments), where / name, arguments)
    save(timm.create_model("resnet10t", num_classes=5), where / "convolution", {})
    swin = {"img_size": 56, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
    network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **swin)
    save(network, where / "window", swin, input_size=(3, 56, 56))
    return where


def save(network, path, arguments, **config):
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_for_hf(network, path, model_args=arguments, data_config=CONFIG | config, safe_serialization=True)


def walk(network, images, blocks):
    """The tokens of a ViT after so many blocks, by hand."""
    x = network.norm_pre(network._pos_embed(network.patch_embed(images)))
    for block in network.blocks[:blocks]:
        x = block(x)
    return x


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("block", [None, 0, 2, -1])
def test_tokens_of_a_vit_are_pooled_without_the_prefix(folder, kind, block):
    images = torch.randn(2, 3, 32, 32)
    opened = open_backbone(str(folder / kind), block=block)
    network = opened.module.network
    prefix = network.num_prefix_tokens
    tokens = walk(network, images, {None: 3, 0: 1, 2: 3, -1: 3}[block])
    tokens = network.norm(tokens) if block is None else tokens
    torch.testing.assert_close(opened.module(images), tokens[:, prefix:].mean(1), rtol=0, atol=1e-5)
    if prefix:
        chosen = open_backbone(str(folder / kind), block=block, pool="class").module
        torch.testing.assert_close(chosen(images), tokens[:, 0], rtol=0, atol=1e-5)


def test_a_file_without_a_final_norm_has_none_in_evaluation(tmp_path):
    """As Meta's fine-tuned files, whose norm stands after the pooling."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 1}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape).eval()
    weights, images = network.state_dict(), torch.randn(2, 3, 32, 32)
    for name, value in weights.items():
        if "pos" not in name:
            value.normal_(std=0.2)
    pooled = weights | {"fc_norm.weight": weights.pop("norm.weight"), "fc_norm.bias": weights.pop("norm.bias")}
    torch.save({name: value for name, value in pooled.items() if not name.startswith("norm.")}, tmp_path / "a.pth")
    source, tokens = f"file:{tmp_path}/a.pth", walk(network, images, 3)[:, 1:]
    torch.testing.assert_close(open_backbone(source).module(images), tokens.mean(1), rtol=0, atol=1e-5)
    dense = open_dense(source).module
    assert not dense.norm
    torch.testing.assert_close(dense(images).flatten(1, 2), tokens, rtol=0, atol=1e-5)
    for use, section in (("encoder", "init"), ("teacher", "teacher")):  # there it is trained, or never reached
        opened = open_network(source, use, spec=EncoderSpec(), section=section)
        assert isinstance(opened.module.norm, torch.nn.LayerNorm)


@pytest.mark.parametrize(("kind", "size", "blocks"), [("convolution", 32, 5), ("window", 56, 2)])
def test_maps_of_other_networks_are_pooled(folder, kind, size, blocks):
    images = torch.randn(2, 3, size, size)
    opened = open_backbone(str(folder / kind))
    network = opened.module.network
    expected = network.forward_head(network.forward_features(images), pre_logits=True)
    assert torch.equal(opened.module(images), expected) and expected.shape == (2, network.num_features)
    maps = network.forward_intermediates(images, intermediates_only=True)
    assert len(maps) == blocks
    for block, found in enumerate(maps):
        pooled = open_backbone(str(folder / kind), block=block).module(images)
        torch.testing.assert_close(pooled, found.flatten(2).mean(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "how", "cause"),
    [
        ("class token", {"block": 3}, r"has no block 3: there are 3, 0 to 2"),
        ("class token", {"block": -4}, r"has no block -4"),
        ("convolution", {"block": 5}, r"has no block 5: there are 5"),
        ("patches only", {"pool": "class"}, "has no class token"),
        ("convolution", {"pool": "class"}, "has no class token"),
    ],
)
def test_what_a_network_has_not_is_refused(folder, kind, how, cause):
    with pytest.raises(ConfigError, match=cause):
        open_backbone(str(folder / kind), **how)


@pytest.mark.parametrize(("kind", "norm"), [("class token", True), ("patches only", False)])
def test_a_norm_after_the_pooling_is_no_norm_of_the_patches(folder, kind, norm):
    opened = open_dense(str(folder / kind)).module
    assert opened.norm == norm and ("norm" in opened.describe()) == norm
    images = torch.randn(2, 3, 32, 32)
    network = opened.network
    tokens = walk(network, images, 3)
    tokens = network.norm(tokens) if norm else tokens
    assert torch.equal(opened(images).flatten(1, 2), tokens[:, network.num_prefix_tokens :])
