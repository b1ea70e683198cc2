"""The frozen teacher: from every kind of source, with its own normalisation and license, run no further than needed."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf

from maedistill.config.pretrain import PretrainConfig
from maedistill.config.pretrain import Teacher as TeacherSection
from maedistill.errors import ConfigError, DataError
from maedistill.methods.teacher import Teacher
from maedistill.models.encoder import MaskedEncoder
from maedistill.models.initialize import initialize
from maedistill.models.masking import random_split
from maedistill.models.vits import build_vit
from maedistill.pretraining.build import build_teacher_source
from maedistill.weights.from_file import EncoderSpec
from maedistill.weights.open_network import open_network

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": 32}
RANDOM = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def split(num_patches=16, teacher=8):
    return random_split(torch.arange(2), seed=0, num_patches=num_patches, num_student=4, num_teacher=teacher)


@pytest.fixture
def saved(tmp_path):
    """A model of 10 classes and its folder, as timm writes it for others."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY).eval()
    config = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "license": "cc-by-nc-4.0"}
    model.pretrained_cfg |= config
    save_for_hf(model, tmp_path / "saved", model_config={"pretrained_cfg": config}, safe_serialization=True)
    return model, tmp_path / "saved"


def test_a_local_folder_of_timm_s_round_trips_with_normalisation_and_license(saved):
    model, folder = saved
    source = open_network(f"local-dir:{folder}", "encoder", grid=4)
    expected = model.state_dict()
    for name, value in source.encoder.vit.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert (source.mean, source.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) and source.license == "cc-by-nc-4.0"
    section = TeacherSection(source=f"local-dir:{folder}", license="mit")
    with pytest.raises(ConfigError, match=r"teacher\.license: 'mit' is not the license"):
        build_teacher_source(PretrainConfig(teacher=section), grid=4)
    line = source.describe()
    assert line.count("\n") == 0
    assert all(part in line for part in (str(folder), "32 x 3", "keys loaded", "(0.1, 0.2, 0.3)", "cc-by-nc-4.0"))
    mean, std = torch.tensor(source.mean).view(3, 1, 1), torch.tensor(source.std).view(3, 1, 1)
    target = Teacher(source, taps=(0, 2))(IMAGES, split())
    expected = MaskedEncoder(model)((IMAGES - mean) / std, split().teacher, taps=(0, 2))[1]
    for tap in (0, 2):
        assert torch.equal(target[tap], expected[tap]) and target[tap].shape == (2, 1 + 8, 32)


@pytest.mark.parametrize("change", ["lost", "foreign", "cut", "no config"])
def test_a_folder_that_does_not_fit_is_refused_never_filled_with_random_weights(saved, change):
    _, folder = saved
    file = folder / "model.safetensors"
    state = load_file(file)
    if change == "lost":
        save_file({key: value for key, value in state.items() if not key.startswith("blocks.1.")}, file)
    elif change == "foreign":
        save_file(state | {"rope.freqs": torch.zeros(3)}, file)
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        (folder / "config.json").unlink()
    with pytest.raises(DataError) as caught:
        open_network(f"local-dir:{folder}", "encoder", grid=4)
    assert str(folder) in caught.value.cause and "\n" not in caught.value.cause


def test_a_file_knows_its_class_token_and_not_its_license(tmp_path):
    spec = EncoderSpec("vit_tiny_patch16_224", **RANDOM)
    for class_token in (True, False):
        vit = build_vit("vit_tiny_patch16_224", image_size=32, class_token=class_token, **RANDOM)
        initialize(vit, seed=3)
        torch.save({"model": vit.state_dict()}, tmp_path / "a.pth")
        source = open_network(f"file:{tmp_path / 'a.pth'}", "encoder", grid=4, spec=spec, section="teacher")
        assert source.encoder.num_prefix == int(class_token)
        assert torch.equal(source.encoder.vit.blocks[2].mlp.fc2.weight, vit.blocks[2].mlp.fc2.weight)
        assert source.license == "not stated" and (source.mean, source.std) == (
            IMAGENET_DEFAULT_MEAN,
            IMAGENET_DEFAULT_STD,
        )
    keywords = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "license": "mine"}
    section = TeacherSection(source=f"file:{tmp_path / 'a.pth'}", model="vit_tiny_patch16_224", **RANDOM, **keywords)
    named = build_teacher_source(PretrainConfig(teacher=section), grid=4)
    assert {"mean": named.mean, "std": named.std, "license": named.license} == keywords


def test_a_run_of_ours_is_a_teacher(mae):
    run = mae.run
    source = open_network(f"run:{run}", "encoder", grid=4)
    weights = load_file(mae.last_checkpoint() / "model.safetensors")
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(value, weights[f"encoder.{name}"]), name
    assert (source.mean, source.std) == ((0.5,) * 3, (0.25,) * 3)
    assert source.license == json.loads((run / "run.json").read_text())["license"]
    assert open_network(f"run:{run}", "encoder", grid=6).encoder.vit.pos_embed.shape == (1, 37, 32)
    with pytest.raises(DataError, match="holds no run"):
        open_network(f"run:{run}-which-is-not-there", "encoder", grid=4)


def test_it_is_frozen_and_stops_at_its_last_tap():
    source = open_network("random:vit_tiny_patch16_224", "encoder", grid=4, spec=EncoderSpec(**RANDOM))
    source.encoder.vit.blocks[2] = source.encoder.vit.norm = torch.nn.Module()  # cannot be called
    teacher, images = Teacher(source, taps=(0, 1)), IMAGES.clone().requires_grad_()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    target = teacher(images, split())
    assert set(target) == {0, 1}
    assert all(value.isfinite().all() and not value.requires_grad for value in target.values())
    assert "mean" not in teacher.state_dict() and "std" not in teacher.state_dict()
    with pytest.raises(ConfigError, match="block 3 does not exist, the teacher has 3"):
        Teacher(source, taps=(1, 3))
