"""Classifiers from run folders, local folders and timm: the network's own outputs, its own input, clear refusals."""

import json

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.models import save_for_hf

from maedistill.config.finetune import FinetuneConfig, Init, Student
from maedistill.errors import ConfigError, DataError
from maedistill.finetuning.build import build_init_source
from maedistill.models.encoder import as_encoder
from maedistill.weights.from_file import EncoderSpec
from maedistill.weights.from_run import describe_network
from maedistill.weights.open_network import given_network, open_network
from tests.exporting import imitation
from tests.exporting.imitation import TINY, imitate


def random_vit(num_classes=3):
    return imitation.random_vit(num_classes=num_classes, global_pool="avg")


def save_export(folder, vit):
    save_for_hf(vit, folder, model_args=describe_network(vit)["arguments"], safe_serialization=True)


def test_a_fine_tuned_run_is_what_it_was(tmp_path):
    vit, ema, images = random_vit(), random_vit(), torch.randn(2, 3, 32, 32)
    run = imitate(tmp_path / "run", vit, "finetune", license="mit")
    for value in ema.state_dict().values():
        value.neg_()
    for source, weights, original in ((run, "model", vit), (f"run:{run}", "ema", ema)):
        opened = open_network(str(source), "classifier", weights=weights)
        assert torch.equal(opened.module(images), original(images))
    assert (opened.mean, opened.std, opened.size, opened.crop) == ((0.5, 0.4, 0.3), (0.25, 0.2, 0.1), 32, 0.9)
    assert (opened.num_classes, opened.classes, opened.license) == (3, ("ant", "bee", "cat"), "mit")
    assert opened.name == f"run:{run} step_000000007 (ema)"
    larger = open_network(str(run), "classifier", image_size=48)
    assert larger.size == 48 and larger.module(torch.zeros(1, 3, 48, 48)).shape == (1, 3)


# A ViT, a network with one size only that timm resizes, and one of any size; what timm says of its input.
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}),
    "window": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)},
    ),
    "convolution": ("resnet10t", {}),
}
CONFIG = {"input_size": (3, 56, 56), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.7}
CONFIG |= {"interpolation": "bilinear", "crop_mode": "squash"}


@pytest.mark.parametrize("kind", MODELS)
def test_any_timm_model_with_timms_word_on_its_input(tmp_path, kind):
    name, arguments = MODELS[kind]
    size = arguments.get("img_size", 56)
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    config = CONFIG | {"input_size": (3, size, size)}
    save_for_hf(model, tmp_path / "out", model_args=arguments, data_config=config, safe_serialization=True)
    opened = open_network(str(tmp_path / "out"), "classifier")
    images = torch.randn(2, 3, size, size)
    assert torch.equal(opened.module(images), model(images)) and not opened.module.training
    found = (opened.size, opened.mean, opened.std, opened.crop, opened.interpolation, opened.crop_mode)
    assert found == (size, *list(CONFIG.values())[1:])
    larger = open_network(f"local-dir:{tmp_path / 'out'}", "classifier", image_size=2 * size)
    assert larger.size == 2 * size and larger.module(torch.zeros(1, 3, 2 * size, 2 * size)).shape == (1, 5)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"crop_pct": 0}, "crop_pct"),
        ({"test_crop_pct": 0}, "test images impossible values: crop_pct"),
        ({"crop_pct": 1e-9}, "crop_pct"),
        ({"test_crop_pct": 1e-9, "test_input_size": (3, 64, 64)}, "test images impossible values: crop_pct"),
        ({"std": []}, "std"),
        ({"interpolation": ""}, "interpolation"),
    ],
)
def test_what_timm_would_take_for_not_stated_is_refused(tmp_path, entry, said):
    """A crop of 0 means all of timm's default, one near 0 all of the memory."""
    save_export(tmp_path / "out", random_vit())
    file = tmp_path / "out/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"pretrained_cfg": config["pretrained_cfg"] | entry}))
    for use in ("classifier", "encoder"):
        with pytest.raises(DataError, match=said) as raised:
            open_network(f"local-dir:{tmp_path}/out", use)
        assert "config.json" in raised.value.remedy


@pytest.mark.parametrize(("classes", "refused"), [(5, True), (3, False), (0, False)])
def test_a_head_that_timm_would_leave_random_is_refused(tmp_path, classes, refused):
    """A config.json by hand: timm drops a classifier of another size, and then takes a file that lacks keys."""
    save_export(tmp_path, random_vit())
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["num_classes"] = classes
    (tmp_path / "config.json").write_text(json.dumps(config))
    if refused:
        with pytest.raises(DataError):
            open_network(f"local-dir:{tmp_path}")
    else:
        assert open_network(f"local-dir:{tmp_path}").num_classes == classes


def test_encoders_are_refused_with_what_to_do(tmp_path):
    encoder = random_vit(num_classes=0)
    run = imitate(tmp_path / "run", encoder)
    save_export(tmp_path / "out", encoder)
    for source in (str(run), f"local-dir:{tmp_path / 'out'}", "timm:vit_base_patch16_224.mae"):
        with pytest.raises(ConfigError, match="has no classifier") as raised:
            open_network(source, "classifier")
        assert (
            f"maedistill finetune CONFIG init.source={'run:' if source == str(run) else ''}{source}"
            in raised.value.remedy
        )


def test_a_size_that_a_network_cannot_take_is_refused(tmp_path):
    model = timm.create_model("levit_128s", embed_dim=(16, 16, 16), num_heads=(1, 1, 1), depth=(1, 1, 1), num_classes=2)
    arguments = {"embed_dim": (16, 16, 16), "num_heads": (1, 1, 1), "depth": (1, 1, 1)}
    save_for_hf(model, tmp_path / "out", model_args=arguments, safe_serialization=True)
    assert open_network(str(tmp_path / "out"), "classifier").size == 224
    with pytest.raises(ConfigError, match="cannot take images of 96 pixels"):
        open_network(str(tmp_path / "out"), "classifier", image_size=96)


@pytest.mark.parametrize(
    ("source", "error", "cause", "remedy"),
    [
        ("resnet18", ConfigError, "'resnet18' is neither a path", "timm:resnet18"),
        ("file:model.pth", DataError, "model.pth: no such file", "check the path"),
        ("model.pth", ConfigError, "there is no file 'model.pth'", "check the path"),
        ("random:resnet18", ConfigError, "cannot be used here", "local-dir"),
        ("{folder}", ConfigError, "neither a run", "maedistill pretrain, finetune or export"),
        ("run:{folder}", DataError, "holds no run", "run folder"),
        ("timm:resnt18", ConfigError, "no model 'resnt18'", "resnet18"),
        ("timm:resnet18.nonesuch", ConfigError, "nonesuch", "resnet18.a1_in1k"),
        ("local-dir:{folder}/none", DataError, "{folder}/none", "name a folder"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path, source, error, cause, remedy):
    source = source.format(folder=tmp_path)
    with pytest.raises(error) as raised:
        open_network(source, "classifier")
    assert cause.format(folder=tmp_path) in raised.value.cause and remedy in raised.value.remedy


def test_only_runs_have_a_moving_average_and_nothing_else_beside_their_weights(tmp_path):
    with pytest.raises(ConfigError, match="timm:resnet10t has no weights called 'ema'"):
        open_network("timm:resnet10t", "classifier", weights="ema")
    run = imitate(tmp_path / "run", random_vit(), "finetune")
    with pytest.raises(ConfigError, match="'state_dict'"):
        open_network(str(run), "classifier", weights="state_dict")


TAGGED = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def test_a_tagged_model_gives_its_files_mean_std_crop_and_license(tmp_path):
    torch.save(random_vit(num_classes=0).state_dict(), tmp_path / "a.pth")
    source, said = f"file:{tmp_path / 'a.pth'}", timm.get_pretrained_cfg(TAGGED)
    opened = open_network(source, "encoder", grid=4, spec=EncoderSpec(TAGGED, **TINY))
    assert (opened.mean, opened.std, opened.crop, opened.license) == (said.mean, said.std, said.crop_pct, said.license)
    assert opened.mean != IMAGENET_DEFAULT_MEAN and opened.normalization_known and "assumed" not in opened.describe()
    config = FinetuneConfig(init=Init(source=source), student=Student(model=TAGGED, **TINY))
    assert build_init_source(config).mean == said.mean
    opened = open_network(source, "outputs", spec=EncoderSpec("vit_tiny_patch16_224", **TINY))
    assert (opened.mean, opened.license, opened.normalization_known) == (IMAGENET_DEFAULT_MEAN, "not stated", False)
    assert "assumed" in opened.describe()
    with pytest.raises(ConfigError, match="'nonesuch'"):
        open_network(source, "encoder", spec=EncoderSpec("vit_tiny_patch16_224.nonesuch", **TINY))


ODD = {"grey": {"in_chans": 1}, "four": {"in_chans": 4}, "rectangles": {"patch_size": (8, 4)}}


@pytest.mark.parametrize(("kind", "numbers"), [("grey", 1), ("four", 3), ("rectangles", 3)])
def test_other_channels_and_rectangular_patches_are_refused_or_work(tmp_path, kind, numbers):
    arguments = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8} | ODD[kind]
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=2, **arguments).eval()
    config = {"mean": [0.5] * numbers, "std": [0.5] * numbers} if kind != "rectangles" else {}
    save_for_hf(vit, tmp_path / "out", model_args=arguments, safe_serialization=True)
    file = tmp_path / "out/config.json"
    stated = json.loads(file.read_text())
    file.write_text(json.dumps(stated | {"pretrained_cfg": stated["pretrained_cfg"] | config}))
    source = f"local-dir:{tmp_path}/out"
    torch.save(vit.state_dict(), tmp_path / "a.pth")
    for refused, how in (
        (source, {"use": "encoder", "grid": 4}),
        (f"file:{tmp_path}/a.pth", {"use": "encoder", "spec": EncoderSpec("vit_tiny_patch16_224", **TINY)}),
        (f"file:{tmp_path}/a.pth", {"use": "any"}),
    ):
        with pytest.raises((ConfigError, DataError), match=r"channels|patches of 8 x 4") as raised:
            open_network(refused, **how)
        assert raised.value.remedy.startswith("use a ")
    with pytest.raises(ConfigError, match=r"channels|patches of 8 x 4"):
        as_encoder(vit, "from Python")
    for use in ("encoder", "classifier", "outputs", "any"):  # init.source, evaluate, distill.teachers
        if kind == "rectangles":
            opened = open_network(source, use, image_size=48)
            assert opened.module(torch.zeros(1, 3, 48, 48)).shape[-1] in (2, 32)
            with pytest.raises(ConfigError, match="patches of 8 pixels"):
                open_network(source, use, image_size=36)
        else:
            with pytest.raises(ConfigError, match=f"{arguments['in_chans']} channels"):
                open_network(source, use)


@pytest.mark.parametrize(("size", "nearest"), [(30, 32), (3, 8), (52, 48)])
def test_a_size_that_patches_do_not_divide_is_refused(tmp_path, size, nearest):
    imitate(tmp_path / "run", random_vit(), "finetune")
    save_export(tmp_path / "out", random_vit())
    for folder, use, key in (("run", "classifier", "--image-size"), ("out", "encoder", "data.image_size")):
        with pytest.raises(ConfigError, match=f"patches of 8 pixels, which do not divide images of {size}") as raised:
            open_network(str(tmp_path / folder), use, image_size=size, size_key=key)
        assert raised.value.remedy.endswith(f"{key}={nearest}")


@pytest.mark.parametrize("stage", [[], "evaluate"])
def test_a_run_of_another_stage_is_refused_whatever_it_states(tmp_path, stage):
    metadata = {"stage": stage, "network": {"name": "vit"}, "input": {"size": 32}, "license": "mit"}
    (tmp_path / "run.json").write_text(json.dumps(metadata))
    with pytest.raises(DataError, match="not valid: stage"):
        open_network(f"run:{tmp_path}")


@pytest.mark.parametrize(
    "claim", [{"embed_dim": 999_936, "depth": 3}, {"depth": 999}, {"mlp_ratio": 999_999.0}, {"num_classes": 900_000}]
)
@pytest.mark.parametrize("kind", ["export", "run"])
def test_claims_that_the_weights_cannot_hold_are_refused_before_a_network_is_built(tmp_path, monkeypatch, kind, claim):
    """A config.json or run.json of a stranger once cost a minute and 4.6 GB."""
    if kind == "export":
        save_export(tmp_path / "it", random_vit())
        file, source = tmp_path / "it/config.json", f"local-dir:{tmp_path / 'it'}"
        stated = json.loads(file.read_text())
        stated["model_args"] = stated.get("model_args", {}) | claim
    else:
        imitate(tmp_path / "it", random_vit(), "finetune")
        file, source = tmp_path / "it/run.json", f"run:{tmp_path / 'it'}"
        stated = json.loads(file.read_text())
        stated["network"]["arguments"] |= claim
    file.write_text(json.dumps(stated))
    monkeypatch.setattr(timm, "create_model", None)
    with pytest.raises(DataError) as refused:
        open_network(source)
    assert next(iter(claim)) in refused.value.cause


@pytest.mark.parametrize("returned", [lambda images: (images,), lambda images: images.sum(), lambda images: None])
def test_a_module_from_python_gives_a_tensor_for_each_image(returned):
    class Given(torch.nn.Module):
        def forward(self, images):
            return returned(images)

    with pytest.raises(ConfigError):
        given_network(Given(), "given", image_size=8).output()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_module_from_python_is_probed_in_its_number_format_and_stays_as_it_is(dtype):
    given = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8), torch.nn.Flatten()).to(dtype)
    network = given_network(given, "given", image_size=8)
    assert network.output().dtype == dtype
    network.module.float().requires_grad_(False)  # as who looks through it does
    assert given.training and {(p.dtype, p.requires_grad) for p in given.parameters()} == {(dtype, True)}
    given[0].seen = given(torch.zeros(1, 3, 8, 8, dtype=dtype))
    with pytest.raises(ConfigError):
        given_network(given, "given", image_size=8)
