"""The classifier that fine-tuning starts with: the source's own features under a fresh head, all of it trained."""

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from torch import nn
from torch.nn import functional as F

from maedistill.config.distill import DistillConfig, DKDConfig, LogitsConfig
from maedistill.config.finetune import Augment, Data, FinetuneConfig, Init, Student
from maedistill.data.images.augment import seed_generators
from maedistill.errors import ConfigError
from maedistill.finetuning.build import build_classifier, build_init_source, build_mixing
from maedistill.finetuning.objective import Supervised
from maedistill.models.patches import position_table
from maedistill.weights.from_file import EncoderSpec
from maedistill.weights.from_run import describe_network, open_run
from maedistill.weights.network import Network
from maedistill.weights.open_network import open_network

MODEL = "vit_tiny_patch16_224"
SHAPE = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
STANDARDISED = DKDConfig(weight=1, standardize=True)
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def random_source(**more) -> Network:
    """An encoder in which no parameter has a special value, with fixed positions, as pre-training leaves it."""
    source = open_network(f"random:{MODEL}", "encoder", image_size=32, spec=EncoderSpec(**SHAPE, **more))
    draws = torch.Generator().manual_seed(1)
    for parameter in source.encoder.parameters():
        nn.init.normal_(parameter, std=0.3, generator=draws)
    assert "pos_embed" in dict(source.encoder.vit.named_buffers())
    return source


def recipe(*, seed=0, size=32, source="run:x", augment=None, **student) -> FinetuneConfig:
    """A config; `student` are its keys in that section."""
    return FinetuneConfig(
        seed=seed,
        init=Init(source=source),
        student=Student(**student),
        data=Data(image_size=size),
        augment=augment or Augment(),
    )


@pytest.mark.parametrize("prefix", [{}, {"register_tokens": 2}, {"class_token": False}])
@torch.no_grad()
def test_mean_of_the_patch_tokens_through_a_fresh_norm(prefix):
    """As He et al. (2022): the encoder's own norm is left out, `fc_norm` is new, the head all but zero."""
    source = random_source(**prefix)
    vit = build_classifier(recipe(global_pool="avg"), source, num_classes=500).eval()
    tokens = source.encoder(IMAGES, taps=[2])[1][2]  # [B, P + N, D]
    pooled = F.layer_norm(tokens[:, source.encoder.num_prefix :].mean(1), (32,), eps=1e-6)  # [B, D]
    torch.testing.assert_close(vit(IMAGES), pooled @ vit.head.weight.T, rtol=1e-4, atol=1e-9)
    assert isinstance(vit.norm, nn.Identity)
    assert vit.fc_norm.weight.eq(1).all() and vit.fc_norm.bias.eq(0).all() and vit.head.bias.eq(0).all()
    assert vit.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)


@torch.no_grad()
def test_class_token_through_the_encoder_s_norm():
    source = random_source()
    vit = build_classifier(recipe(global_pool="token"), source, num_classes=5).eval()
    features = source.encoder(IMAGES)[0][:, 0]  # [B, D], after the norm
    torch.testing.assert_close(vit(IMAGES), features @ vit.head.weight.T, rtol=1e-4, atol=1e-9)
    assert isinstance(vit.fc_norm, nn.Identity) and torch.equal(vit.norm.weight, source.encoder.vit.norm.weight)


def test_from_scratch_the_seed_decides_and_positions_are_mae_s():
    scratch = {"model": MODEL, **SHAPE}
    one, again, other = (
        build_classifier(recipe(seed=seed, source=None, **scratch), None, num_classes=5) for seed in (3, 3, 4)
    )
    expected = one.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert torch.equal(one.pos_embed, position_table("sincos2d", grid=4, width=32, num_prefix=1))
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name]) == ("norm" in name or name.endswith("bias") or name == "pos_embed")


def test_the_head_starts_almost_at_0_unless_logits_are_standardised():
    for settings, std in (({}, 2e-5), ({"logits": LogitsConfig(weight=1)}, 2e-5), ({"dkd": STANDARDISED}, 0.02)):
        config = recipe(source=None, model=MODEL, **SHAPE).model_copy(update={"distill": DistillConfig(**settings)})
        assert build_classifier(config, None, num_classes=500).head.weight.std().item() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("origin", ["scratch", "source"])
@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_every_parameter_is_trained_with_mixing_and_drop_path(origin, global_pool):
    """Positions too, which pre-training keeps fixed in a buffer. Drop path grows linearly with depth."""
    source = random_source() if origin == "source" else None
    student = {"drop_path": 0.2, "global_pool": global_pool, **SHAPE}
    config = recipe(**student) if source else recipe(source=None, model=MODEL, **student)
    module = Supervised(build_classifier(config, source, num_classes=5))
    assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in module.vit.blocks] == pytest.approx([0, 0.1, 0.2])
    seed_generators(0)
    mixing = build_mixing(config, num_classes=5, device=torch.device("cpu"))
    module(*mixing(IMAGES.clone(), torch.arange(6) % 5))["loss"].backward()
    names = {name for name, _ in module.named_parameters()}
    assert "vit.pos_embed" in names and not dict(module.named_buffers())
    assert {name for name, parameter in module.named_parameters() if parameter.grad.count_nonzero()} == names


@pytest.fixture(scope="module", params=["pre-trained run", "fine-tuned run", "folder of timm's", "file"])
def origin(request, tmp_path_factory):
    """A source of each kind, the network that is in it, and what the config must say of the student."""
    if request.param.endswith("run"):
        run = request.getfixturevalue({"pre-trained run": "mae", "fine-tuned run": "tuned"}[request.param]).run
        return f"run:{run}", open_run(run).vit, {}
    path, vit = tmp_path_factory.mktemp("origin") / "saved", build_classifier(recipe(), random_source(), num_classes=7)
    if request.param == "file":
        save_file(vit.state_dict(), path.with_suffix(".safetensors"))
        return f"file:{path.with_suffix('.safetensors')}", vit, {"model": MODEL, **SHAPE}
    save_for_hf(vit, path, model_args=describe_network(vit)["arguments"], safe_serialization=True)
    return f"local-dir:{path}", vit, {}


@pytest.mark.parametrize("size", [32, 64])
def test_a_source_of_any_kind_keeps_its_weights_at_any_resolution(origin, size):
    name, original, student = origin
    config = recipe(source=name, size=size, **student)
    source = build_init_source(config)
    vit = build_classifier(config, source, num_classes=5)
    grid = [size // 8, size // 8]
    expected = original.state_dict()
    expected["pos_embed"] = resample_abs_pos_embed(expected["pos_embed"], grid, num_prefix_tokens=1)
    found = vit.state_dict()
    assert all(name.split(".")[0] in ("head", "fc_norm", "norm") for name in found.keys() ^ expected.keys())
    for name in found.keys() - {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}:
        assert torch.equal(found[name], expected[name]), name
    assert vit(torch.zeros(2, 3, size, size)).shape == (2, 5)


FITTING = {**SHAPE, "class_token": True, "register_tokens": 0}


@pytest.mark.parametrize(
    ("student", "cause", "remedy"),
    [
        ({"model": "vit_small_patch16_224"}, "has width 32, student.width or the recipe's", "says 384"),
        ({"num_heads": 4}, "has num_heads 2", "says 4"),
        ({"class_token": False}, "has class_token True", "says False"),
        ({"register_tokens": 2}, "has register_tokens 0", "says 2"),
    ],
)
def test_a_source_of_another_shape_is_refused(student, cause, remedy):
    source = random_source()
    build_classifier(recipe(**FITTING), source, num_classes=5)
    with pytest.raises(ConfigError) as raised:
        build_classifier(recipe(**student), source, num_classes=5)
    error = raised.value
    assert cause in error.cause and remedy in error.cause + error.remedy and "\n" not in error.cause + error.remedy


@pytest.mark.parametrize("source", [None, "run:x"])
def test_pooling_a_class_token_that_is_not_there_is_refused(source):
    if source is None:
        config = recipe(source=None, model="vit_base_patch16_siglip_224", global_pool="token")
    else:
        config = recipe(global_pool="token")
    opened = source and random_source(class_token=False)
    with pytest.raises(ConfigError, match="has no class token to read"):
        build_classifier(config, opened, num_classes=5)
