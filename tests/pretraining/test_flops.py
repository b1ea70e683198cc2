"""FLOPs per image stay below what DESIGN promises: nothing hidden is embedded, no teacher block runs unused."""

import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from maedistill.benchmark.plain_step import PlainTeacher, plain_version
from maedistill.config.pretrain import Decoder
from maedistill.methods.amd import AMD, GeneratorSpec
from maedistill.methods.dmae import DMAE, AlignmentSpec
from maedistill.methods.mae import PixelSpec
from maedistill.methods.teacher import Teacher
from maedistill.models.decoder import TokenDecoder
from maedistill.models.encoder import MaskedEncoder, build_vit
from maedistill.pretraining.flops import count_flops
from maedistill.weights.network import Network

PUBLISHED = {"width": 512, "depth": 8, "num_heads": 16}
LIGHT = {"width": 384, "depth": 4, "num_heads": 6}


def gflops(
    method: str, *, student: str, teacher: str, decoder: dict[str, int], plain: bool = False
) -> dict[str, float]:
    """Counts for vit_{student} distilled from vit_{teacher} at 224 px with the papers' taps and masks."""
    with torch.device("meta"):
        guide = MaskedEncoder(build_vit(f"vit_{teacher}_patch16_224", image_size=224))
        deep = guide.depth
        taps = {"dmae": ((8,), (deep * 3 // 4 - 1,)), "amd": ((5, 11), (deep // 2 - 1, deep - 1))}[method]
        source = Network(guide.vit, "meta", 224, "")
        encoder = MaskedEncoder(
            build_vit(f"vit_{student}_patch16_224", image_size=224, pos_embed="sincos2d", class_token=method == "dmae")
        )
        shape = {"grid": 14, "patch_size": 16, "num_prefix": encoder.num_prefix}
        specs = {
            "pixels": PixelSpec(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            "align": AlignmentSpec(*taps, teacher_width=guide.width, teacher_prefix=guide.num_prefix),
        }
        specs |= {"generate": GeneratorSpec(num_heads=guide.width // 64)} if method == "amd" else {}
        kind = {"dmae": DMAE, "amd": AMD}[method]
        model = kind(encoder, TokenDecoder(encoder.width, **shape, **decoder), **specs)
        guide = Teacher(source, taps=taps[1])
        if plain:
            model, guide = plain_version(model), PlainTeacher(guide, Decoder(**PUBLISHED))
    return count_flops(model, guide, num_student=49, num_teacher=49 if method == "dmae" else 98)


@pytest.mark.parametrize(
    ("method", "teacher", "student", "decoder", "most"),
    [
        ("dmae", "large", "base", PUBLISHED, 82.5),  # the published loop spends 100.6
        ("dmae", "base", "small", PUBLISHED, 46.5),  # 58.7; tests/test_configs.py counts those of every config
        ("amd", "large", "base", LIGHT, 128.0),
    ],
)
def test_gflops_per_image(method: str, teacher: str, student: str, decoder: dict[str, int], most: float) -> None:
    counts = gflops(method, student=student, teacher=teacher, decoder=decoder)
    print({name: round(value, 2) for name, value in counts.items()})
    assert counts["total"] <= most
    assert counts["backward"] > counts["encoder"] + counts["decoder"]  # the backward pass was counted, all of it


@pytest.mark.parametrize(
    ("teacher", "student", "published"),
    [("large", "base", 100.6), ("base", "small", 58.7)],
)
def test_the_plain_step_costs_what_the_published_loop_does(teacher: str, student: str, published: float) -> None:
    counts = gflops("dmae", student=student, teacher=teacher, decoder=PUBLISHED, plain=True)
    assert counts["total"] == pytest.approx(published, rel=0.01)
