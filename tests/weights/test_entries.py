"""Checkpoints with several networks, and prefixes of any code base: the right one is opened, the others are named."""

import pytest
import timm
import torch

from maedistill.commands.evaluate_arguments import parse_features, parse_score
from maedistill.config.distill import DistillConfig
from maedistill.config.finetune import FinetuneConfig, Init, Student
from maedistill.config.pretrain import PretrainConfig, Teacher
from maedistill.errors import ConfigError, DataError
from maedistill.finetuning.build import build_init_source
from maedistill.finetuning.build_distillation import open_teachers
from maedistill.models.initialize import initialize
from maedistill.models.vits import build_vit
from maedistill.pretraining.build import build_teacher_source
from maedistill.weights.from_file import EncoderSpec
from maedistill.weights.open_network import open_network
from maedistill.weights.state_dict import import_weights

TINY = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def state(seed, **shape):
    vit = build_vit("vit_tiny_patch16_224", image_size=32, **TINY | shape)
    initialize(vit, seed=seed)
    return vit.state_dict()


A, B = state(1), state(2)
HEAD = {"head.mlp.0.weight": torch.zeros(8, 32), "head.last_layer.weight_g": torch.zeros(9, 1)}
CENTRE = {"center": torch.zeros(1, 9)}


def under(prefix, weights):
    return {f"{prefix}{key}": value for key, value in weights.items()}


# Content of the file -> the name that chooses -> the network that is then opened; by default that of `model`.
SEVERAL = {
    "timm": ({"state_dict": A, "state_dict_ema": B}, {"model": A, "ema": B, "state_dict_ema": B, "state_dict": A}),
    "DeiT": ({"model": A, "optimizer": {"state": {0: CENTRE}}, "model_ema": B, "scaler": {}}, {"model": A, "ema": B}),
    "ema first": ({"ema_model": B, "model": A}, {"model": A, "ema_model": B, "ema": B}),
    "nested": ({"ema": {"module": under("module.", B)}, "state": {"model": A}}, {"model": A, "ema": B}),
    "DINO": (
        {
            "student": under("module.backbone.", A) | under("module.", HEAD),
            "teacher": under("backbone.", B) | HEAD,
            "dino_loss": CENTRE,
            "epoch": 3,
        },
        {"model": B, "teacher": B, "student": A, "ema": B},
    ),
    "iBOT": ({"teacher": under("backbone.", B) | HEAD | {"backbone.masked_embed": torch.zeros(1, 32)}}, {"model": B}),
    "MoCo": (
        {
            "state_dict": under("module.base_encoder.", A | HEAD)
            | under("module.momentum_encoder.", B)
            | {"module.predictor.0.weight": torch.zeros(3, 3)}
        },
        {"model": A, "base_encoder": A, "momentum_encoder": B, "ema": B},
    ),
    "Lightning": ({"state_dict": under("model.", A) | under("model_ema.module.", B)}, {"model": A, "ema": B}),
    "torch_ema": ({"model": A, "ema": {"decay": 0.9, "shadow_params": [*B.values()]}}, {"model": A, "ema": B}),
    "torch's average": (under("module.", A) | {"n_averaged": torch.tensor(3)}, {"model": A}),
    "deep": ({"a": {"b": {"c": {"d": A}}}}, {"model": A}),
    "averages alone": ({"model_ema": B}, {"model": B, "ema": B}),
}  # fmt: skip


@pytest.mark.parametrize("case", SEVERAL)
def test_the_network_of_a_checkpoint_that_is_named_is_opened(case):
    content, chosen = SEVERAL[case]
    for weights, expected in chosen.items():
        imported = import_weights(content, weights=weights)
        found = imported.part("encoder.vit.")
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        assert not imported.foreign


@pytest.mark.parametrize(
    ("case", "used", "unused"),
    [("timm", "state_dict", "state_dict_ema"), ("DINO", "teacher", "student")],
)
def test_what_is_used_and_what_else_is_there_is_said(tmp_path, case, used, unused):
    torch.save(SEVERAL[case][0], tmp_path / "a.pth")
    spec = EncoderSpec(**TINY)
    how = {"spec": spec, "section": "teacher"}
    audit = open_network(f"file:{tmp_path}/a.pth", "encoder", **how).audit
    assert f"weights of {used}, not of {unused}" in audit and "(teacher.weights" in audit
    assert case == "timm" or "unused (head" in audit
    with pytest.raises(ConfigError) as refused:
        open_network(f"file:{tmp_path}/a.pth", "encoder", **how, weights="nonesuch")
    assert used in refused.value.cause and unused in refused.value.cause and "teacher.weights" in refused.value.remedy


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_what_may_be_meant_is_asked_where_a_name_does_not_tell(weights):
    content = {"left": A, "right": B, "left_ema": A, "right_ema": B}
    with pytest.raises(ConfigError, match="left, right, left_ema, right_ema"):
        import_weights(content, weights=weights)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.", "_orig_mod.", "backbone.", "module.backbone.", "model.", "base_encoder.", "encoder.", "vit.",
        "model._orig_mod.", "module.model.encoder.backbone.", "encoder.model.module.", "encoder.vit.",
    ],
)  # fmt: skip
def test_prefixes_come_off_in_any_order(prefix):
    for content in (under(prefix, A), {"state_dict": under(prefix, A | {"head.weight": torch.zeros(3, 32)})}):
        imported = import_weights(content)
        assert imported.part("encoder.vit.").keys() == A.keys() and not imported.foreign


def test_wrappers_inside_names_come_off_and_what_does_not_fit_is_refused():
    wrapped = {key.replace("blocks.1.", "blocks.1._orig_mod."): value for key, value in under("backbone.", A).items()}
    assert import_weights(wrapped).part("encoder.vit.").keys() == A.keys()
    odd = import_weights(wrapped | {"backbone.rope": torch.zeros(1), "head.rope": torch.zeros(1)})
    assert odd.foreign == ("rope",) and odd.dropped == ("head.rope",)


def test_a_file_that_holds_itself_many_times_is_read_once():
    """A few kilobytes of references would else take hours."""
    content = {"state_dict": A}
    content |= {f"again{i}": content for i in range(2000)}
    assert import_weights(content).part("encoder.vit.").keys() == A.keys()
    many = {f"a{i}.patch_embed.proj.weight": torch.zeros(1) for i in range(2000)}
    with pytest.raises(ConfigError, match="which one is meant"):
        import_weights(many)


def native(vit):
    """The weights of a timm ViT as DINOv2 saves them: registers by another name, positions for the class token too."""
    weights, row = dict(vit.state_dict()), torch.full((1, 1, 32), 0.5)
    weights["register_tokens"] = weights.pop("reg_token")
    weights["pos_embed"] = torch.cat([row, weights["pos_embed"]], 1)
    weights["cls_token"] = weights["cls_token"] - row
    return weights | {"mask_token": torch.zeros(1, 32)}


def test_registers_of_dinov2_are_timms(tmp_path):
    vit = build_vit("vit_small_patch14_reg4_dinov2", image_size=32, **TINY).eval()
    for i, parameter in enumerate(vit.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    chunks = {key.replace("blocks.", "blocks.0."): value for key, value in native(vit).items()}
    assert import_weights(chunks).weights.keys() == import_weights(native(vit)).weights.keys()
    torch.save({"teacher": under("backbone.", chunks) | HEAD}, tmp_path / "a.pth")
    spec, images = EncoderSpec("vit_small_patch14_reg4_dinov2", **TINY), torch.randn(2, 3, 32, 32)
    opened = open_network(f"file:{tmp_path}/a.pth", "encoder", grid=4, spec=spec).module.eval()
    torch.testing.assert_close(opened.forward_features(images), vit.forward_features(images))
    for model in ("vit_small_patch14_dinov2", None):  # registers, or LayerScale, that it does not have
        with pytest.raises((DataError, ConfigError)) as refused:
            open_network(f"file:{tmp_path}/a.pth", "encoder", spec=EncoderSpec(model, **TINY), section="teacher")
        named = refused.value.remedy.rpartition("teacher.model=")[2].partition(";")[0]
        assert "_reg4_dinov2" in named and timm.is_model(named)


@pytest.mark.parametrize("registers", [1, 8])
def test_a_file_says_how_many_registers_there_are(tmp_path, registers):
    vit = build_vit("vit_small_patch14_reg4_dinov2", image_size=32, register_tokens=registers, **TINY).eval()
    for i, parameter in enumerate(vit.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    torch.save(vit.state_dict(), tmp_path / "a.pth")
    spec, images = EncoderSpec("vit_small_patch14_reg4_dinov2", **TINY), torch.randn(2, 3, 32, 32)
    opened = open_network(f"file:{tmp_path}/a.pth", "encoder", grid=4, spec=spec).module.eval()
    torch.testing.assert_close(opened.forward_features(images), vit.forward_features(images))


def test_every_stage_has_a_key_that_chooses(tmp_path):
    shape = {"width": 64, "depth": 1, "num_heads": 1, "patch_size": 8}
    torch.save({"model": state(1, **shape), "model_ema": state(2, **shape)}, tmp_path / "a.pth")
    source, expected = f"file:{tmp_path}/a.pth", state(2, **shape)["cls_token"]
    student = Student(model="vit_tiny_patch16_224", **shape)
    distill = DistillConfig(teachers=(source,), weights=("model_ema",))
    tuned = FinetuneConfig(init=Init(source=source, weights="ema"), student=student, distill=distill)
    taught = PretrainConfig(teacher=Teacher(source=source, weights="ema"))
    for network in (
        build_teacher_source(taught, grid=4),
        build_init_source(tuned),
        open_teachers(tuned, classes=(), num_classes=3)[0].network,
    ):
        assert torch.equal(network.module.state_dict()["cls_token"], expected)
    for words, chosen in (([], "model"), (["--ema"], "ema"), (["--weights", "model_ema"], "model_ema")):
        assert parse_score([source, "val.tar", *words]).weights == chosen
        assert parse_features("knn", [source, "--train=a", "--val=b", *words]).weights == chosen
