"""What is seen of a network is what it computes, and a teacher is fed what it expects, whatever the student reads."""

import pytest
import timm
import torch
from timm.data import ImageNetInfo
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as vision
from torchvision.transforms.v2.functional import InterpolationMode

from maedistill.errors import ConfigError
from maedistill.finetuning.outputs import RequestedOutputs, feature_info, forward_outputs, is_plain_vit
from maedistill.finetuning.teacher import OutputTeacher
from maedistill.weights.class_names import shared_classes
from maedistill.weights.network import Network

PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
STUDENT = {"student_mean": (0.5, 0.4, 0.3), "student_std": (0.2, 0.3, 0.25), "student_grid": 4}
VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": 32}
NETWORKS = {
    "resnet": ("resnet10t", {}),
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit with registers": ("vit_tiny_patch16_224", VIT | {"reg_tokens": 2, "qk_norm": True, "init_values": 0.5}),
    "vit, mean of tokens": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "class_token": False}),
    "deit with a distillation token": ("deit_tiny_distilled_patch16_224", VIT),
    "convnext": ("test_convnext", {}),
    "efficientnet": ("test_efficientnet", {}),
    "hiera": ("hiera_tiny_224", {"img_size": (32, 32), "embed_dim": 16, "stages": (1, 1, 1, 1)}),
}


def network(name: str, **changed) -> torch.nn.Module:
    """One of NETWORKS in which no parameter has a special value."""
    model, keywords = NETWORKS[name]
    torch.manual_seed(0)
    built = timm.create_model(model, num_classes=5, **keywords | changed).eval()
    for parameter in built.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return built


def classifier(built: torch.nn.Module, *, size: int = 32, classes: tuple[str, ...] = (), count: int = 5) -> Network:
    """A teacher as it is opened, with a normalisation that is not the student's."""
    words = {"name": "run:x", "interpolation": "bicubic", "crop_mode": "center", "license": "mit"}
    statistics = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    return Network(built, **words, **statistics, size=size, crop=1.0, num_classes=count, classes=classes)


@torch.no_grad()
def test_attention_of_large_queries_and_keys_is_finite_in_half_precision():
    """Each product is 16 x 80 x 80 = 102,400, too large for fp16; all are equal, and so is the attention."""
    built = network("vit").half()
    for value in (built.blocks[1].attn.qkv.weight, built.blocks[1].attn.qkv.bias):
        value.zero_()
    built.blocks[1].attn.qkv.bias[:64] = 80.0
    seen = forward_outputs(built, PIXELS.half(), RequestedOutputs(attention=(1,)))["attention/1"]
    torch.testing.assert_close(seen, torch.full_like(seen, 1 / 17))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_outputs_are_what_the_network_computes(name):
    built = network(name)
    info = feature_info(built, name="run:x", image_size=32)
    deepest = len(info.channels) - 1
    seen = forward_outputs(built, PIXELS, RequestedOutputs(logits=True, embedding=True, features=(0, deepest)))
    torch.testing.assert_close(seen["logits"], built(PIXELS))
    torch.testing.assert_close(seen["embedding"], built.forward_head(built.forward_features(PIXELS), pre_logits=True))
    for depth in (0, deepest):
        (expected,) = built.forward_intermediates(PIXELS, indices=[depth], intermediates_only=True)
        torch.testing.assert_close(seen[f"features/{depth}"], expected)
        assert expected.shape == (3, info.channels[depth], info.grids[depth], info.grids[depth])
        alone = forward_outputs(built, PIXELS, RequestedOutputs(features=(depth,)))
        assert torch.equal(alone[f"features/{depth}"], seen[f"features/{depth}"])
    assert info.embedding == seen["embedding"].shape[1]


@pytest.mark.parametrize("name", [name for name in NETWORKS if "vit" in name])
@torch.no_grad()
def test_queries_keys_and_values_are_those_of_the_block(name, monkeypatch):
    built, calls, attend = network(name), [], F.scaled_dot_product_attention
    prefix = built.num_prefix_tokens
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a) or attend(*a, **k))
    built(PIXELS)
    assert len(calls) == 3
    seen = forward_outputs(built, PIXELS, RequestedOutputs(relations=(0, 2), attention=(1, 2)))
    for block in (0, 2):
        for part, expected in zip(("query", "key", "value"), calls[block], strict=True):
            torch.testing.assert_close(seen[f"{part}/{block}"], expected[:, :, prefix:])
    for block in (1, 2):
        query, key, _ = calls[block]
        received = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(2)[:, :, prefix:]
        torch.testing.assert_close(seen[f"attention/{block}"].flatten(2), received)


def test_nothing_deeper_than_requested_runs():
    for name in ("resnet", "vit"):
        built, ran = network(name), []
        layers = [built.layer1, built.layer2, built.layer3] if name == "resnet" else list(built.blocks)
        for i, layer in enumerate(layers):
            layer.register_forward_hook(lambda *_, i=i, ran=ran: ran.append(i))
        forward_outputs(built, PIXELS, RequestedOutputs(features=(2 if name == "resnet" else 1,)))
        assert ran == [0, 1]


@pytest.mark.parametrize(("name", "changed"), [("resnet", {}), ("vit", {"img_size": 48})])
@torch.no_grad()
def test_a_teacher_of_another_normalisation_and_resolution_is_fed_what_it_expects(name, changed):
    """Equality with the teacher run alone on the pixels, from the student's normalised images."""
    built = network(name, **changed)
    requested = RequestedOutputs(logits=True, embedding=True, features=(1,))
    teacher = OutputTeacher(classifier(built, size=48), requested=requested, **STUDENT, classes=(3, 0))
    mean, std = (torch.tensor(STUDENT[f"student_{of}"]).view(3, 1, 1) for of in ("mean", "std"))
    seen = teacher((PIXELS - mean) / std)
    large = vision.resize(PIXELS, [48, 48], interpolation=InterpolationMode.BICUBIC, antialias=True)
    own_mean, own_std = (torch.tensor(values).view(3, 1, 1) for values in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    alone = (large - own_mean) / own_std
    torch.testing.assert_close(seen["logits"], built(alone)[:, [3, 0]], rtol=1e-4, atol=1e-5)
    (maps,) = built.forward_intermediates(alone, indices=[1], intermediates_only=True)
    assert seen["features/1"].shape == (3, maps.shape[1], 4, 4) and maps.shape[-1] != 4
    expected = F.interpolate(maps, size=(4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen["features/1"], expected, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(name.startswith("network.") for name in teacher.state_dict()), "no statistics of images"


def test_classes_are_found_by_name_or_refused():
    built = network("resnet")
    named = classifier(built, classes=("a", "b", "c", "d", "e"))
    assert shared_classes(named, ("d", "b"), num_classes=2) == (3, 1)
    assert shared_classes(named, ("a", "b", "c", "d", "e"), num_classes=5) is None
    assert shared_classes(classifier(built), ("x", "y", "z", "v", "w"), num_classes=5) is None, "as many, unknown"
    for teacher, names, cause in (
        (named, ("a", "q"), "does not know 1 of the student's 2 classes, 'q' among them"),
        (classifier(built), ("a", "b"), "knows 5 classes, the student has 2, and the teacher's are not known"),
        (named, (), "knows 5 classes, the student has 2, and the student's are not known"),
    ):
        with pytest.raises(ConfigError) as raised:
            shared_classes(teacher, names, num_classes=2)
        assert cause in raised.value.cause and "terms on features" in raised.value.remedy


def test_a_model_of_imagenet_s_is_known_by_its_synsets():
    """1,000 classes of which a student's subset is found, without a name in the weights."""
    built = timm.create_model("resnet10t").eval()
    teacher = classifier(built, count=1000)
    object.__setattr__(teacher, "name", "timm:resnet10t")
    found = shared_classes(teacher, ("n01443537", "n01440764"), num_classes=2)
    assert found == (1, 0)
    words = ImageNetInfo("imagenet-1k").label_descriptions()
    assert shared_classes(teacher, (words[7], words[3]), num_classes=2) == (7, 3), "or by their words"
    assert is_plain_vit(network("vit")) and not is_plain_vit(built)
