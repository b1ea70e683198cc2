"""What a fine-tuning config derives from its keys, and its rule for RandAugment against timm's own parser."""

import pytest
from timm.data.auto_augment import rand_augment_transform

from maedistill.config.architectures import Architecture
from maedistill.config.finetune import Augment, FinetuneConfig, Init, Optim, Student
from maedistill.config.finetune_rules import RULES
from maedistill.config.pretrain import PretrainConfig

SMALL = Architecture(width=384, depth=12, num_heads=6, patch_size=16)


@pytest.mark.parametrize(
    ("source", "student", "architecture"),
    [
        (None, {"model": "vit_small_patch16_224"}, SMALL),
        (None, {"model": "vit_small_patch16_224", "num_heads": 12}, Architecture(384, 12, 12, 16)),
        ("file:x.safetensors", {"model": "vit_small_patch16_224"}, SMALL),
        ("timm:vit_small_patch16_224.augreg_in1k", {}, SMALL),
        ("timm:vit_so400m_patch14_224", {}, None),
        # These know their dimensions themselves: a run of vit_small with patches of 4 px is still named vit_small.
        ("run:runs/x", {"model": "vit_small_patch16_224"}, None),
        ("local-dir:x", {}, None),
        ("hf-hub:x/y", {}, None),
    ],
)
def test_architecture_is_known_where_the_config_alone_says_it(source, student, architecture):
    config = FinetuneConfig(init=Init(source=source), student=Student(**student))
    assert config.student_architecture == architecture


def test_the_base_rate_is_that_of_the_stage():
    assert Optim().peak_lr == 5e-4 * 1024 / 256
    assert Optim(base_lr=1e-3, global_batch=512).peak_lr == 1e-3 * 512 / 256
    assert Optim(lr=0.1).peak_lr == 0.1
    assert PretrainConfig().optim.peak_lr == 1.5e-4 * 4096 / 256


def test_images_are_mixed_only_where_a_kind_is_left():
    assert Augment().mixes and Augment(mixup=0.0).mixes and Augment(cutmix=0.0).mixes
    assert not Augment(mixup=0.0, cutmix=0.0).mixes


@pytest.mark.parametrize(
    "text",
    [
        "rand", "rand-m9", "rand-m9-mstd0.5-inc1", "rand-inc0-n3-p0.5-mmax10", "rand-m2-n1", "rand-n16", "rand-n100",
        "rand-m14-mmax15-n3-p0.7-tweights", "rand-tweights-n15", "rand-n015-tweights", "rand-m16-tweights",
    ],
)  # fmt: skip
def test_notation_that_timm_reads_is_taken(text):
    rand_augment_transform(text)
    assert _problems(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "", "random-m9", "augmix-m3", "rand-m9.5", "rand-q3", "rand-m9-", "rand-m", "rand m9", "rand-m9\n", "rand-x3",
        "rand-m9-inc", "rand-m9-twieghts", "rand-m9-t3a", "rand-n16-tweights", "rand-tweights-n20",
        "rand-m9-n016-p1-tweights", "rand-tweights-n100",
    ],
)  # fmt: skip
def test_notation_that_timm_refuses_or_silently_drops_is_refused(text):
    assert _problems(text) == ["augment.rand_augment"]


def _problems(rand_augment: str) -> list[str]:
    student = Student(model="vit_small_patch16_224")
    config = FinetuneConfig(student=student, augment=Augment(rand_augment=rand_augment))
    return [problem.key for rule in RULES for problem in rule(config)]
