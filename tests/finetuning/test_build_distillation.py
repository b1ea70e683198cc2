"""What cannot teach is refused before the run starts: two lines that name the key, the teacher and what to do."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards
from maedistill.errors import UserError
from maedistill.finetuning.setup import open_finetuning
from tests.conftest import SCRATCH

VIT = {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 8}
# Folder of a teacher: model, its arguments, image size, names of its classes.
TEACHERS = {
    "resnet": ("resnet10t", {"num_classes": 3}, 48, None),
    "ten": ("resnet10t", {"num_classes": 10}, 48, None),
    "letters": ("resnet10t", {"num_classes": 4}, 48, ["c", "x", "b", "a"]),
    "numbers": ("resnet10t", {"num_classes": 3}, 48, ["1", "2", "3"]),
    "vit": ("vit_tiny_patch16_224", {"num_classes": 3, "img_size": 48} | VIT, 48, None),
    "encoder": ("vit_tiny_patch16_224", {"num_classes": 0, "img_size": 32} | VIT, 32, None),
    "parallel": ("vit_small_patch16_18x2_224", {"num_classes": 3, "img_size": 32} | VIT, 32, None),
}
# Teacher, settings of `distill`, exit code, cause, remedy.
REFUSED = {
    "other classes": ("ten", ["logits.weight=1"], 2, "knows 10 classes, the student has 3", "terms on features"),
    "other names": ("numbers", ["dkd.weight=1"], 2, "not know 3 of the student's 3 classes, 'a'", "with these"),
    "no classifier": ("encoder", ["hard_label.weight=1"], 2, "and distill.hard_label compares", "fine-tune it"),
    "no attention maps": (
        "resnet", ["attention={weight: 1, student: [1], teacher: [3]}"], 2,
        "distill.attention.teacher: local-dir:{made}/resnet has no attention maps that can be seen",
        "distill.attention_transfer",
    ),
    "no plain blocks": (
        "parallel",
        ["attention={weight: 1, student: [1], teacher: [1]}"],
        2,
        "no attention maps",
        "vit_small_patch16_224",
    ),
    "no queries": (
        "resnet", ["token_relations={weight: 1, student: [1], teacher: [3]}"], 2, "no attention maps",
        "vit_small_patch16_224",
    ),
    "no such depth": (
        "resnet", ["hints={weight: 1, student: [1], teacher: [5]}"], 2,
        "distill.hints.teacher: depth 5 does not exist, local-dir:{made}/resnet has 5", "use 0 to 4",
    ),
    "no such block": (
        "vit", ["attention_transfer={weight: 1, student: [1], teacher: [3]}"], 2, "depth 3 does not exist",
        "use 0 to 2",
    ),
    "another grid": (
        "vit", ["token_relations={weight: 1, student: [1], teacher: [1]}"], 2,
        "sees 6 x 6 patches, the student 4 x 4", "distill.image_size=32",
    ),
    "heads that do not divide": (
        "vit", ["token_relations={weight: 1, student: [1], teacher: [1]}", "image_size=32"], 2,
        "3 heads do not divide the widths 32 and 48", "distill.token_relations.num_heads=1",
    ),
    "no token": (
        "resnet", ["hard_label={weight: 1, token: true}"], 2, "no register token for", "student.register_tokens=1",
    ),
    "no such folder": (
        "none", ["logits.weight=1"], 3, "distill.teachers: local-dir:{made}/none cannot", "model.safetensors",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of teachers with random weights, and of pictures without labels."""
    folder = tmp_path_factory.mktemp("made")
    for name, (model, arguments, size, classes) in TEACHERS.items():
        network = timm.create_model(model, **arguments)
        config = {"input_size": (3, size, size), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
        config |= {"interpolation": "bicubic"}
        save_for_hf(
            network,
            folder / name,
            model_args=arguments,
            safe_serialization=True,
            data_config=config,
            model_config={"label_names": classes} if classes else None,
        )
    (folder / "pictures" / "train").mkdir(parents=True)
    for i in range(24):
        pixels = np.full((32, 32, 3), 10 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / "train" / f"{i:02d}.png")
    return folder


def opened(finetuning, *settings):
    """The parts of a run with these settings."""
    config = load_config(finetuning.config, [*SCRATCH, *settings, "run=nowhere"], root=FinetuneConfig).config
    return open_finetuning(config, world_size=1, device=torch.device("cpu"))


def taught(made, teacher, settings):
    """The settings of a teacher and its terms."""
    return [f'distill.teachers=["local-dir:{made}/{teacher}"]', *(f"distill.{setting}" for setting in settings)]


@pytest.mark.parametrize("case", REFUSED)
def test_a_teacher_that_cannot_teach_is_refused(finetuning, made, case):
    teacher, settings, code, cause, remedy = REFUSED[case]
    with pytest.raises(UserError) as raised:
        opened(finetuning, *taught(made, teacher, settings))
    error = raised.value
    assert error.exit_code == code and "\n" not in error.cause + error.remedy
    assert cause.format(made=made) in error.cause and remedy in error.remedy


def test_an_image_size_that_a_teacher_s_patches_do_not_tile_is_refused(finetuning, tuned):
    settings = [f'distill.teachers=["run:{tuned.run}"]', "distill.logits.weight=1", "distill.image_size=36"]
    with pytest.raises(UserError, match="8 pixels, which do not divide images of 36") as raised:
        opened(finetuning, *settings)
    assert "distill.image_size=32" in raised.value.remedy


def test_no_relations_in_micro_batches_of_one(finetuning, made):
    settings = ["augment.mixup=0", "augment.cutmix=0", "optim.global_batch=1", "optim.lr=1e-3"]
    with pytest.raises(UserError, match=r"distill\.pkt compares images of a micro-batch, and there is only 1"):
        opened(finetuning, *settings, *taught(made, "resnet", ["pkt.weight=1"]))


def test_an_encoder_without_classifier_teaches_what_it_has(finetuning, made):
    settings = ["hints={weight: 1, student: [1], teacher: [2]}", "similarity_preserving.weight=1"]
    parts = opened(finetuning, *taught(made, "encoder", settings))
    (outputs,), _ = parts.teacher_outputs(torch.randn(2, 3, 32, 32), 0)
    assert {name: tuple(seen.shape) for name, seen in outputs.items()} == {
        "features/2": (2, 48, 4, 4),
        "embedding": (2, 48),
    }


def test_a_subset_of_a_teacher_s_classes_is_taken_by_name(finetuning, made):
    parts = opened(finetuning, *taught(made, "letters", ["logits.weight=1"]))
    assert parts.teachers[0].classes == (3, 2, 0), "a, b, c of the shards"
    (outputs,), weights = parts.teacher_outputs(torch.randn(2, 3, 32, 32), 0)
    assert outputs["logits"].shape == (2, 3) and weights.tolist() == [1]


def test_labels_are_needed_by_what_reads_them_only(finetuning, made, tmp_path):
    """Without labels KD alone learns, and the validation shards tell the classes; DKD and cross-entropy need them."""
    make_shards(open_folder(made / "pictures"), tmp_path / "bare")
    bare = f"data.train={tmp_path}/bare/train-*.tar"
    parts = opened(finetuning, bare, *taught(made, "resnet", ["logits.weight=1", "label_weight=0"]))
    assert parts.num_classes == 3 and len(parts.samples) == 24
    for settings in (["logits.weight=1"], ["dkd.weight=1", "label_weight=0"]):
        with pytest.raises(UserError, match="24 of 24 samples have no label"):
            opened(finetuning, bare, *taught(made, "resnet", settings))
