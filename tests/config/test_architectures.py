"""The table of dimensions against timm itself, for every name that it covers."""

import pytest
import timm
from timm.models import model_entrypoint
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from maedistill.config.architectures import Architecture, architecture_of
from maedistill.config.pretrain import Student
from maedistill.config.shared_rules import FAMILIES
from maedistill.models.meta import meta_device

COVERED = [name for name in timm.list_models() if architecture_of(name, Student())]


def test_the_table_is_what_timm_builds():
    assert len(COVERED) >= 50
    for name in COVERED:
        with meta_device():
            model = timm.create_model(name)
        assert isinstance(model, VisionTransformer | Eva), name
        patch_size, _ = model.patch_embed.patch_size
        num_heads = model.blocks[0].attn.num_heads
        built = Architecture(model.embed_dim, len(model.blocks), num_heads, patch_size)
        assert architecture_of(name, Student()) == built, name


def test_every_pretrained_tag_of_a_covered_name_is_covered():
    for name in timm.list_pretrained("vit_*"):
        plain = name.partition(".")[0]
        assert architecture_of(name, Student()) == architecture_of(plain, Student()), name


def test_overrides_win():
    student = Student(width=64, depth=2, num_heads=4, patch_size=8)
    assert architecture_of("vit_small_patch16_224", student) == Architecture(64, 2, 4, 8)


@pytest.mark.parametrize(
    "name", ["resnet50", "vit_relpos_base_patch16_224", "vit_base_r50_s16_224", "vit_so400m_patch14_224"]
)
def test_other_names_are_not_guessed(name):
    assert architecture_of(name, Student()) is None


def test_no_vision_transformer_of_timm_is_refused_by_its_name():
    modules = ("timm.models.vision_transformer", "timm.models.deit", "timm.models.eva")
    names = [name for name in timm.list_models() if model_entrypoint(name).__module__ in modules]
    assert len(names) > 100
    assert [name for name in names if not name.startswith(FAMILIES)] == []
