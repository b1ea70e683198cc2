"""FLOPs per image are those of docs/performance.md: nothing hidden is embedded, no teacher block runs unused."""

import pytest
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from maedistill.benchmark.plain_step import PlainTeacher, plain_version
from maedistill.config.pretrain import Decoder
from maedistill.methods.amd import AMD, GeneratorSpec
from maedistill.methods.dmae import DMAE, AlignmentSpec
from maedistill.methods.mae import PixelSpec
from maedistill.methods.teacher import Teacher
from maedistill.models.decoder import CrossDecoder, TokenDecoder
from maedistill.models.encoder import MaskedEncoder
from maedistill.models.meta import meta_device
from maedistill.models.vits import build_vit
from maedistill.pretraining.flops import count_flops
from maedistill.weights.network import Network

PUBLISHED = {"width": 512, "depth": 8, "num_heads": 16}
LIGHT = {"width": 384, "depth": 4, "num_heads": 6}


def gflops(
    method: str,
    *,
    student: str,
    teacher: str,
    decoder: dict[str, int],
    plain: bool = False,
    shared: bool = False,
    sees: int | None = None,
) -> dict[str, float]:
    """Counts for vit_{student} distilled from vit_{teacher} at 224 px with the papers' taps and masks.

    shared: by cross-attention, in amd without generators. sees: patches that the teacher sees, up to its last block.
    """
    with meta_device():
        guide = MaskedEncoder(build_vit(f"vit_{teacher}_patch16_224", image_size=224))
        deep = guide.depth
        taps = {"dmae": ((8,), (deep * 3 // 4 - 1,)), "amd": ((5, 11), (deep // 2 - 1, deep - 1))}[method]
        taps = ((8,), (deep - 1,)) if sees is not None else taps
        source = Network(guide.vit, "meta", 224, "")
        encoder = MaskedEncoder(
            build_vit(
                f"vit_{student}_patch16_224",
                image_size=224,
                pos_embed="sincos2d",
                class_token=method == "dmae" or sees is not None,
            )
        )
        shape = {"grid": 14, "patch_size": 16, "num_prefix": encoder.num_prefix}
        specs = {
            "pixels": PixelSpec(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            "align": AlignmentSpec(*taps, guide.width, guide.num_prefix, class_token=encoder.num_prefix == 1),
        }
        by = "decoder" if shared else "own"
        specs |= {"generate": GeneratorSpec(num_heads=guide.width // 64, by=by)} if method == "amd" else {}
        kind, light = {"dmae": DMAE, "amd": AMD}[method], CrossDecoder if shared else TokenDecoder
        model = kind(encoder, light(encoder.width, **shape, **decoder), **specs)
        guide = Teacher(source, taps=taps[1])
        if plain:
            model, guide = plain_version(model), PlainTeacher(guide, Decoder(**PUBLISHED))
    return count_flops(model, guide, num_student=49, num_teacher=sees or (49 if method == "dmae" else 98))


@pytest.mark.parametrize(
    ("method", "teacher", "student", "decoder", "gflop"),
    [
        ("dmae", "large", "base", PUBLISHED, 80.4),  # the published loop spends 100.6
        ("dmae", "base", "small", PUBLISHED, 44.4),  # 58.7; tests/test_configs.py counts those of every config
        ("amd", "large", "base", LIGHT, 120.1),
    ],
)
def test_gflops_per_image(method: str, teacher: str, student: str, decoder: dict[str, int], gflop: float) -> None:
    counts = gflops(method, student=student, teacher=teacher, decoder=decoder)
    print({name: round(value, 2) for name, value in counts.items()})
    assert round(counts["total"], 1) == gflop
    assert counts["backward"] > counts["encoder"] + counts["decoder"]  # the backward pass was counted, all of it


@pytest.mark.parametrize("sees", [98, 196])
def test_a_shared_decoder_costs_what_dmae_does(sees: int) -> None:
    """At the same teacher's view and the same decoder, where AMD's own generators cost about as much as all else."""
    given = {"student": "small", "teacher": "base", "decoder": LIGHT, "sees": sees}
    ours, own = gflops("amd", shared=True, **given), gflops("amd", **given)["total"]
    for decoder_is_cross in (True, False):
        dmae = gflops("dmae", shared=decoder_is_cross, **given)["total"]
        print(f"{ours['total']:.1f}, DMAE {dmae:.1f}, own generators {own:.1f}: {ours['total'] / dmae:.3f}")
        assert ours["total"] <= 1.25 * dmae and ours["total"] < 0.9 * own
    assert ours["generators"] > 0


@pytest.mark.parametrize(
    ("teacher", "student", "published"),
    [("large", "base", 100.6), ("base", "small", 58.7)],
)
def test_the_plain_step_costs_what_the_published_loop_does(teacher: str, student: str, published: float) -> None:
    counts = gflops("dmae", student=student, teacher=teacher, decoder=PUBLISHED, plain=True)
    assert counts["total"] == pytest.approx(published, rel=0.01)
