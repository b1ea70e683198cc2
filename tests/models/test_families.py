"""Families of plain ViTs in timm, small and randomly initialised, as teachers and students that see chosen patches.

Every parameter is random in the comparisons, layer scales and biases too, so that nothing is compared that timm's
initial values hide. They are in float64, where another order of sums cannot hide an error either.
"""

import copy
import re

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError, UserError
from maedistill.exporting.folder import export
from maedistill.losses.features import mean_of_blocks
from maedistill.methods.dmae import DMAE, AlignmentSpec
from maedistill.methods.mae import PixelSpec
from maedistill.methods.teacher import Teacher
from maedistill.models.decoder import TokenDecoder
from maedistill.models.encoder import MaskedEncoder, has_class_token
from maedistill.models.initialize import initialize
from maedistill.models.masking import random_split
from maedistill.models.patches import gather_rows
from maedistill.models.vits import build_vit
from maedistill.pretraining.build import alignment_spec, build_encoder, build_teacher_source
from maedistill.pretraining.flops import count_flops
from maedistill.weights.from_file import EncoderSpec
from maedistill.weights.network import Network
from maedistill.weights.open_network import open_network

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
GRID = 4
BRANCHLESS = "eva02_enormous_patch14_clip_224"  # its norms come after attention and MLP
FAMILIES = {
    # VisionTransformer
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {},  # registers, positions of patches alone, layer scale
    "vit_base_patch16_radio_v3": {},  # 8 prefix tokens
    "vit_so400m_patch16_radio_v4": {},
    "vit_base_patch16_siglip_224": {},  # no class token
    "vit_base_patch16_siglip_gap_224": {},
    "vit_base_patch16_clip_224": {},  # a norm before the blocks
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_base_patch14_reg1_tipsv2": {},
    "beit3_base_patch16_224": {},
    "aimv2_large_patch14_224": {},  # RMS norms, SwiGLU
    "vit_huge_patch14_gap_224": {},  # I-JEPA
    # Eva
    "vit_small_patch16_dinov3": {},  # rotary positions alone, registers, any image size
    "vit_small_patch16_dinov3_qkvb": {},  # EUPE's too
    "eva02_tiny_patch14_224": {},  # absolute and rotary positions
    "eva02_base_patch16_clip_224": {},
    "eva02_enormous_patch14_clip_224": {},  # norms after attention and MLP, no rotary positions
    "vit_pe_core_tiny_patch16_384": {},
    "vit_pe_spatial_tiny_patch16_512": {},  # no final norm
    "vit_pe_lang_large_patch14_448": {},
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_mixed_224": {},  # learned frequencies of each block and head
    "vit_small_patch16_rope_mixed_ape_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
    "vit_small_patch16_lingbot": {},
    "vit_base_patch16_sapiens2": {"num_kv_heads": 1},  # fewer heads of keys and values
}


def small(name: str, *, grid: int = GRID) -> torch.nn.Module:
    """A model of the family, two blocks deep, for images of `grid` x `grid` patches."""
    shape = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 0, "global_pool": ""} | FAMILIES[name]
    patch = int(re.search(r"patch(\d+)", name)[1])
    return timm.create_model(name, img_size=grid * patch, **shape).eval()


def randomised(name: str) -> MaskedEncoder:
    """Such a model in float64, of which every parameter is random."""
    vit = small(name).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
    return MaskedEncoder(vit)


def pictures(encoder: MaskedEncoder, dtype: torch.dtype = torch.float64) -> Tensor:
    side = encoder.grid * encoder.patch_size
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_all_patches_in_random_order_give_timm_s_features(name: str) -> None:
    encoder = randomised(name)
    images, ids = pictures(encoder), torch.stack([torch.randperm(GRID**2) for _ in range(2)])
    expected, tokens = encoder.vit.forward_features(images), encoder(images, ids)[0]
    assert expected.std() > 0.1
    first = encoder.num_prefix
    torch.testing.assert_close(tokens[:, :first], expected[:, :first], rtol=0, atol=1e-12)
    torch.testing.assert_close(tokens[:, first:], gather_rows(expected[:, first:], ids), rtol=0, atol=1e-12)
    torch.testing.assert_close(encoder(images)[0], expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_the_patches_are_what_attention_over_them_alone_gives(name: str) -> None:
    """timm drops all other patches by a mask of keys. The walk does not even look at them."""
    encoder = randomised(name)
    images, ids = pictures(encoder)[:1], torch.randperm(GRID**2)[None, : GRID**2 // 2]
    hidden = torch.ones(GRID, GRID, dtype=torch.bool).flatten().index_fill(0, ids[0], False)
    seen = torch.cat([torch.ones(encoder.num_prefix, dtype=torch.bool), ~hidden])
    expected = encoder.vit.forward_features(images, attn_mask=seen.expand(1, 1, len(seen), -1))
    spoiled = images.clone()
    pixels = hidden.view(GRID, GRID).repeat_interleave(encoder.patch_size, 0).repeat_interleave(encoder.patch_size, 1)
    spoiled[..., pixels] = torch.nan
    tokens = encoder(spoiled, ids)[0]
    first = encoder.num_prefix
    torch.testing.assert_close(tokens[:, :first], expected[:, :first], rtol=0, atol=1e-12)
    torch.testing.assert_close(tokens[:, first:], gather_rows(expected[:, first:], ids), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != BRANCHLESS])
def test_a_branch_is_what_timm_s_block_adds_after_its_attention(name: str) -> None:
    encoder, seen = randomised(name), {}
    for i, block in enumerate(encoder.vit.blocks):
        block.norm2.register_forward_pre_hook(lambda _, given, i=i: seen.update({f"attended {i}": given[0]}))
        block.register_forward_hook(lambda _, given, out, i=i: seen.update({f"output {i}": out}))
    images = pictures(encoder)
    expected = encoder.vit.forward_features(images)
    added = {i: seen[f"output {i}"] - seen[f"attended {i}"] for i in (0, 1)}
    assert all(value.std() > 0.1 for value in added.values())
    tokens, branches = encoder(images, branches=(0, 1))
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(branches, added, rtol=0, atol=1e-12)
    assert encoder(images, branches=(0,), to_last_tap=True)[1].keys() == {0}
    split = random_split(torch.arange(2), seed=0, num_patches=GRID**2, num_student=4, num_teacher=GRID**2)
    rows, first = branch_teacher(encoder)(images, split)[1], encoder.num_prefix
    mean = mean_of_blocks([added[0], added[1]])
    torch.testing.assert_close(rows[:, first:], gather_rows(mean[:, first:], split.teacher), rtol=0, atol=1e-4)


def branch_teacher(encoder: MaskedEncoder) -> Teacher:
    """The network as a teacher of what its MLPs add, the mean over its first two blocks."""
    source = Network(encoder.vit, "x", encoder.grid * encoder.patch_size, "", mean=(0, 0, 0), std=(1, 1, 1))
    return Teacher(source, taps=(1,), last=2, output="mlp", dtype=torch.float64)


def test_a_family_without_such_a_branch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"align\.output.*\nuse align\.output=block"):
        branch_teacher(randomised(BRANCHLESS))


def learning(vit: torch.nn.Module, *, initial: bool = True) -> tuple[DMAE, Teacher]:
    """A student from scratch, and as its teacher the same network; the map between their features is the identity."""
    encoder = MaskedEncoder(vit)
    shape = {"grid": GRID, "patch_size": encoder.patch_size, "num_prefix": encoder.num_prefix}
    decoder = TokenDecoder(encoder.width, width=16, depth=1, num_heads=2, **shape)
    prefix = {"teacher_prefix": encoder.num_prefix, "class_token": has_class_token(encoder)}
    align = AlignmentSpec((1,), (1,), encoder.width, **prefix, distance="mse", normalize="none")
    method = DMAE(encoder, decoder, pixels=PixelSpec(MEAN, STD), align=align)
    if initial:
        for parameter in method.parameters():
            parameter.data.fill_(torch.nan)
        initialize(method, seed=0)
        with torch.no_grad():
            torch.nn.init.eye_(method.projections[0].weight)
    size = encoder.grid * encoder.patch_size
    return method, Teacher(Network(copy.deepcopy(vit), "itself", size, "", mean=MEAN, std=STD), taps=(1,))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_begins_where_its_equal_teacher_is_and_gradients_reach_all_of_it(name: str) -> None:
    method, teacher = learning(small(name))
    images = pictures(method.encoder, torch.float32)
    split = random_split(torch.arange(2), seed=0, num_patches=GRID**2, num_student=8, num_teacher=8)
    losses = method(images, split, teacher(images, split))
    assert losses["align/1"] == 0 and losses["pixels"] > 0.1
    losses["loss"].backward()
    bare = [name for name, p in method.encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not bare
    assert all(value.isfinite().all() for value in method.state_dict().values())


@torch.no_grad()
def test_rotations_are_those_of_evaluation_whatever_the_mode() -> None:
    """In training, timm draws random scales for this model at every call."""
    vit = small("vit_base_patch16_sapiens2")
    expected = vit.rope.get_embed(shape=[GRID, GRID])
    vit.train()
    assert not torch.equal(vit.rope.get_embed(shape=[GRID, GRID]), expected)
    assert torch.equal(MaskedEncoder(vit).rope[0], expected) and vit.rope.training


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("vit_small_patch16_dinov3", [True, False, False, False, False]),
        ("vit_medium_patch16_rope_reg1_gap_256", [False]),
    ],
)
def test_class_tokens_are_aligned_and_registers_are_not(name: str, counts: list[bool]) -> None:
    method, teacher = learning(small(name))
    images = pictures(method.encoder, torch.float32)
    split = random_split(torch.arange(2), seed=0, num_patches=GRID**2, num_student=8, num_teacher=8)
    target, found = teacher(images, split), []
    for row in range(method.encoder.num_prefix):
        changed = target[1].clone()
        changed[:, row] += 1
        found.append(bool(method(images, split, {1: changed})["align/1"] > 0))
    assert found == counts


@pytest.mark.parametrize(
    ("source", "normalize", "expected"),
    [
        ("random:vit_small_patch16_224", "whiten", True),
        ("random:vit_small_patch16_dinov3", "whiten", True),
        ("random:vit_small_patch16_224", "stored", False),  # the statistics are those of patches
        ("random:vit_medium_patch16_rope_reg1_gap_256", "whiten", False),  # one prefix token, a register
    ],
)
def test_a_student_with_a_class_token_aligns_it_with_another(source: str, normalize: str, expected: bool) -> None:
    config = teacher_config(source=source)
    config = config.model_copy(update={"align": config.align.model_copy(update={"normalize": normalize})})
    encoder = build_encoder(config)
    teacher = build_teacher_source(config, grid=encoder.grid).encoder
    assert alignment_spec(config, encoder, teacher).class_token == expected


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3"])
def test_a_finer_teacher_gives_the_mean_of_the_patches_that_cover_one_of_the_student_s(name: str) -> None:
    vit, patch = small(name, grid=2 * GRID), 14 if "14" in name else 16
    teacher = Teacher(Network(vit, name, 2 * GRID * patch, "", mean=MEAN, std=STD), taps=(1,))
    images = torch.rand(2, 3, 32, 32)  # of any size: the teacher resizes them
    split = random_split(torch.arange(2), seed=0, num_patches=GRID**2, num_student=4, num_teacher=GRID**2)
    rows, prefix = teacher(images, split)[1], teacher.num_prefix
    plain = teacher.encoder(teacher.prepare(images), taps=(1,))[1][1][:, prefix:].mT.unflatten(-1, (2 * GRID,) * 2)
    expected = gather_rows(F.avg_pool2d(plain, 2).flatten(2).mT, split.teacher)
    assert rows.shape == (2, prefix + GRID**2, 32)
    torch.testing.assert_close(rows[:, prefix:], expected, rtol=0, atol=1e-5)
    half = random_split(torch.arange(2), seed=0, num_patches=GRID**2, num_student=4, num_teacher=8)
    assert teacher(images, half)[1].shape == (2, prefix + 8, 32)


def teacher_config(**teacher: object) -> PretrainConfig:
    shape = {"width": 32, "depth": 2, "num_heads": 2}
    return PretrainConfig.model_validate(
        {
            "data": {"image_size": 64},
            "student": {"model": "vit_tiny_patch16_224", **shape},
            "teacher": {"source": "random:vit_small_patch14_dinov2", **shape, **teacher},
            "align": {"student": [1], "teacher": [1]},
        },
        strict=False,
    )


@pytest.mark.parametrize(("given", "size"), [(None, 56), (56, 56), (112, 112)])
def test_the_grids_meet_at_the_image_size_of_the_teacher(given: int | None, size: int) -> None:
    config = teacher_config(image_size=given)
    source = build_teacher_source(config, grid=build_encoder(config).grid)
    assert source.size == size and source.encoder.grid == size // 14


def test_grids_that_cannot_meet_are_refused_with_a_size_that_works() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.image_size") as refusal:
        build_teacher_source(teacher_config(image_size=64), grid=GRID)
    size = int(re.search(r"use (\d+)", refusal.value.remedy)[1])
    assert build_teacher_source(teacher_config(image_size=size), grid=GRID).size == size


def test_rotations_cost_no_flops_and_a_finer_teacher_those_of_its_tokens() -> None:
    """The matrix products of a RoPE ViT are those of an equal ViT with absolute positions."""

    def gflops(name: str, factor: int = 1) -> dict[str, float]:
        with torch.device("meta"):
            vit = build_vit(name, image_size=64, width=32, depth=2, num_heads=2, patch_size=16, register_tokens=0)
            method, _ = learning(vit, initial=False)
            guide = build_vit(name, image_size=64 * factor, width=32, depth=2, num_heads=2, patch_size=16)
            teacher = Teacher(Network(guide, name, 64 * factor, "", mean=MEAN, std=STD), taps=(1,))
        return count_flops(method, teacher, num_student=8, num_teacher=8)

    absolute = gflops("deit3_small_patch16_224")
    for rotary in ("vit_small_patch16_rope_224", "vit_small_patch16_rope_mixed_224"):
        assert gflops(rotary) == absolute
    ratio = gflops("vit_small_patch16_rope_mixed_224", 2)["teacher"] / absolute["teacher"]
    assert 33 / 9 < ratio < (33 / 9) ** 2  # of the tokens, to be squared in attention


@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3_qkvb", "vit_small_patch16_rope_mixed_224"]
)
def test_a_file_of_timm_s_opens_if_its_model_is_named(name: str, tmp_path) -> None:
    vit = small(name)
    for key, value in vit.named_parameters():
        value.data.normal_(0, 0.1 if key.endswith("bias") else 0.02)
    torch.save(vit.state_dict(), tmp_path / "a.pth")
    spec = EncoderSpec(name, width=32, depth=2, num_heads=2)
    with pytest.raises(UserError):  # its shapes alone could be those of a ViT without rotations
        open_network(f"file:{tmp_path}/a.pth", "encoder", grid=GRID, spec=EncoderSpec(), section="teacher")
    opened = open_network(f"file:{tmp_path}/a.pth", "encoder", grid=GRID, spec=spec, section="teacher").module
    for key, value in vit.state_dict().items():
        assert torch.equal(opened.state_dict()[key], value), key


ROPE_STUDENTS = {
    "mixed": "vit_small_patch16_rope_mixed_ape_224",  # learned frequencies beside absolute positions
    "pe": "vit_pe_spatial_tiny_patch16_512",  # a norm before the blocks, none after
}


@pytest.mark.parametrize("kind", ROPE_STUDENTS)
def test_a_rope_student_is_trained_exported_and_fine_tuned(kind: str, pretraining, finetuning) -> None:
    run = pretraining(f"rope_{kind}", "method=mae", f"student.model={ROPE_STUDENTS[kind]}", "optim.epochs=1").run
    opened = open_network(f"run:{run}", "encoder", grid=GRID)
    images = torch.randn(2, 3, 32, 32)
    vit = timm.create_model(f"local-dir:{export(run)}", pretrained=True).eval()  # which compares bit for bit
    with torch.no_grad():
        expected, tokens = vit.forward_features(images), opened.encoder(images)[0]
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
    assert open_network(f"run:{run}", "encoder", grid=2 * GRID).encoder.grid == 2 * GRID
    tuned = finetuning(f"rope_{kind}_tuned", f"init.source=run:{run}", "optim.epochs=1").run
    classifier = timm.create_model(f"local-dir:{export(tuned)}", pretrained=True).eval()
    ours = open_network(f"run:{tuned}", "classifier").module
    with torch.no_grad():
        assert torch.equal(classifier(images), ours(images)) and classifier(images).shape == (2, 3)
