"""What holds for all methods: gradients reach everything, nothing is uninitialised, terms add up, loss falls."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from maedistill.data.images.transforms import normalize
from maedistill.methods.amd import AMD, GeneratorSpec
from maedistill.methods.dmae import DMAE, AlignmentSpec
from maedistill.methods.mae import MAE, PixelSpec, pixel_target
from maedistill.methods.teacher import Teacher
from maedistill.methods.tinymim import RelationSpec, TinyMIM
from maedistill.models.blocks import projection
from maedistill.models.decoder import CrossDecoder, TokenDecoder
from maedistill.models.encoder import MaskedEncoder
from maedistill.models.initialize import initialize
from maedistill.models.masking import PatchSplit, random_split
from maedistill.models.patches import patchify, unpatchify
from maedistill.models.vits import build_vit
from maedistill.weights.from_file import EncoderSpec
from maedistill.weights.open_network import open_network

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
CASES = ["mae", "dmae", "amd", "amd with class token", "amd learned", "dmae two pairs"]
CASES += ["mae cross", "dmae partial", "amd cross partial", "tinymim", "tinymim two pairs"]
CASES += ["amd cross shared", "amd cross partial shared with class token", "dmae mlp"]


def build(case: str) -> tuple[MAE, Teacher | None, PatchSplit, torch.Tensor]:
    """A method of 32 x 3 at 32 px with 64 patches, a teacher of 48 x 4 with patches twice as wide, and a batch."""
    name = case.split()[0]
    token = name != "amd" or "class token" in case
    pos_embed = "learned" if "learned" in case else "sincos2d"
    shape = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 4}
    vit = build_vit("vit_tiny_patch16_224", image_size=32, class_token=token, pos_embed=pos_embed, **shape)
    encoder = MaskedEncoder(vit)
    shape = {"width": 16, "depth": 1, "num_heads": 2, "grid": 8, "patch_size": 4}
    kind = CrossDecoder if "cross" in case else TokenDecoder
    decoder = kind(32, num_prefix=encoder.num_prefix, **shape)
    target, ratio = "norm_patch_channel" if name == "amd" else "norm_patch", 0.25 if "partial" in case else 1.0
    pixels, teacher = PixelSpec(MEAN, STD, target=target, predict_ratio=ratio), None
    if name != "mae":
        taps = ((0, 2), (1, 3)) if name == "amd" or "two" in case else ((1,), (2,))
        spec = EncoderSpec(width=48, depth=4, num_heads=4, patch_size=8)
        source = open_network("random:vit_tiny_patch16_224", "encoder", grid=8, spec=spec)
        teacher = Teacher(source, taps=taps[1], relations=name == "tinymim")
        projector = "mlp" if "mlp" in case else "linear"
        prefix = {"teacher_prefix": 1, "class_token": encoder.num_prefix == 1}
        align = AlignmentSpec(*taps, teacher_width=48, **prefix, projector=projector)
    if name == "mae":
        method = MAE(encoder, decoder, pixels=pixels)
    elif name == "dmae":
        method = DMAE(encoder, decoder, pixels=pixels, align=align)
    elif name == "amd":
        align = replace(align, distance="mse", normalize="none")
        generate = GeneratorSpec(num_heads=1, by="decoder" if "shared" in case else "own")
        method = AMD(encoder, decoder, pixels=pixels, align=align, generate=generate)
    else:
        relations = RelationSpec(*taps, teacher_prefix=1, num_heads=(4,) * len(taps[0]))
        method = TinyMIM(encoder, decoder, pixels=pixels, relations=relations)
    split = random_split(
        torch.arange(4), seed=0, num_patches=64, num_student=16, num_teacher=32 if name == "amd" else 16
    )
    return method, teacher, split, torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def losses_of(method: MAE, teacher: Teacher | None, split: PatchSplit, images: torch.Tensor) -> dict:
    return method(images, split, teacher(images, split) if teacher is not None else None)


def test_the_mlp_head_is_linear_norm_gelu_linear() -> None:
    head, rows = projection(6, 10, kind="mlp"), torch.randn(3, 6)
    first, norm, last = head[0], head[1], head[3]
    hidden = F.layer_norm(F.linear(rows, first.weight, first.bias), (10,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(head(rows), F.linear(F.gelu(hidden), last.weight, last.bias))


@pytest.mark.parametrize("case", CASES)
def test_nan_filled_parameters_are_all_initialised_and_get_gradients(case: str) -> None:
    method, teacher, split, images = build(case)
    for parameter in method.parameters():
        parameter.data.fill_(torch.nan)
    initialize(method, seed=0)
    assert all(value.isfinite().all() for value in method.state_dict().values())
    losses_of(method, teacher, split, images)["loss"].backward()
    # The last block's output of a prefix token that nothing reads still moves through attention: all get gradients.
    bare = [name for name, p in method.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not bare
    if teacher is not None:
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


@pytest.mark.parametrize("case", CASES)
def test_terms_add_up_by_name(case: str) -> None:
    method, teacher, split, images = build(case)
    initialize(method, seed=0)
    for name, weight in (("pixels", 2.0), ("align", 3.0), ("relations", 3.0), ("generate", 5.0)):
        if hasattr(method, name):
            setattr(method, name, replace(getattr(method, name), weight=weight))
    method.ramp.fill_(0.5)  # of the terms of a teacher
    losses = losses_of(method, teacher, split, images)
    groups = {kind: [v for name, v in losses.items() if name.startswith(kind)] for kind in ("align/", "generate/")}
    expected = 2 * losses["pixels"]
    both = 2 if "tinymim" in case else 1  # QK and VV: their sum counts
    for kind, weight in (("align/", 1.5 * both), ("generate/", 2.5)):
        if groups[kind]:
            expected = expected + weight * sum(groups[kind]) / len(groups[kind])
    torch.testing.assert_close(losses["loss"], expected)
    count = {"mae": 0, "dmae": 1, "amd": 2, "tinymim": 2}[case.split()[0]] * (2 if "two" in case else 1)
    assert len(groups["align/"]) == count and len(groups["generate/"]) == (count if "amd" in case else 0)


@pytest.mark.parametrize("case", ["mae", "dmae", "amd", "tinymim", "mae cross", "dmae partial", "amd cross shared"])
def test_one_batch_is_learned(case: str) -> None:
    method, teacher, split, images = build(case)
    initialize(method, seed=0)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    history = []
    for _ in range(60):
        losses = losses_of(method, teacher, split, images)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append({name: float(value.detach()) for name, value in losses.items()})
    assert history[-1].keys() == history[0].keys()
    falls = {name: history[-1][name] < 0.95 * history[0][name] for name in history[0]}
    assert all(falls.values()), falls


def perfect(method: MAE, images: torch.Tensor, _: torch.Tensor, split: PatchSplit, ids: torch.Tensor) -> torch.Tensor:
    """A decoder that knows the answers."""
    normalized = normalize(images, method.mean, method.std)
    return pixel_target(method.pixels_of(images, normalized, ids), kind=method.pixels.target)


def test_a_picture_of_perfect_predictions_is_the_image() -> None:
    """`draw` inverts exactly what the loss compares with, for every kind of target."""
    for kind, case in (("raw", "mae"), ("norm_patch", "mae partial"), ("norm_patch_channel", "mae")):
        method, _, split, images = build(case)
        initialize(method, seed=0)
        method.pixels = replace(method.pixels, target=kind)
        method.decoder.forward = partial(perfect, method, images)
        drawn = method.draw(images, split)
        rows = torch.zeros(4, 64).scatter_(1, split.hidden, 1.0)
        mask = rows.view(4, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
        torch.testing.assert_close(drawn, images * mask, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decoder", ["", "cross"])
def test_a_share_is_predicted_of_pixels_that_the_rest_does_not_touch(decoder: str) -> None:
    """12 of 48: the loss is the mean over them, and what the other hidden patches hold changes nothing."""
    method, _, split, images = build(f"mae {decoder} partial")
    initialize(method, seed=0)
    asked, left = split.hidden[:, :12], split.hidden[:, 12:]
    normalized = normalize(images, method.mean, method.std)
    predicted = method.decoder(method.encoder(normalized, split.student)[0], split, asked)
    target = pixel_target(method.pixels_of(images, normalized, asked), kind="norm_patch")
    expected = (predicted - target).square().mean()
    noisy = patchify(images, 4).scatter(1, left[..., None].expand(-1, -1, 48), 7.0)
    for version in (images, unpatchify(noisy, 4)):
        torch.testing.assert_close(method(version, split)["pixels"], expected)
    shown = method.draw(images, split)
    assert (patchify(shown, 4).gather(1, left[..., None].expand(-1, -1, 48)) > 0).any(2).all(), "pictures show all"


def test_student_and_teacher_patches_cover_the_same_part_of_the_image() -> None:
    """A teacher with other patches sees the image resized to the student's grid: a bright patch stays patch i."""
    _, teacher, _, _ = build("dmae")
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 8:12, 20:24] = 1.0  # patch (2, 5): id 21
    seen = {}
    teacher.encoder.forward = lambda x, ids, **_: (None, seen.setdefault("x", x))
    teacher(images, PatchSplit(torch.arange(64)[None], 64, 64))
    assert seen["x"].shape[-1] == 64
    means = seen["x"].mean(1).unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2)).flatten()
    assert int(means.argmax()) == 21


def test_without_pixels_a_student_that_sees_all_is_compared_with_timms_own_features() -> None:
    method, teacher, _, images = build("dmae with class token")
    initialize(method, seed=0)
    method.decoder = None
    split = random_split(torch.arange(4), seed=0, num_patches=64, num_student=64, num_teacher=64)
    losses = losses_of(method, teacher, split, images)
    assert losses.keys() == {"loss", "align/1"} and losses["loss"] == losses["align/1"]
    rows = []
    own = normalize(images, method.mean, method.std)
    for vit, block, seen in ((method.encoder.vit, 1, own), (teacher.encoder.vit, 2, teacher.prepare(images))):
        features, prefix = vit.forward_intermediates(seen, [block], True, output_fmt="NLC", intermediates_only=True)[0]
        rows.append(torch.cat([prefix, features], dim=1))
    expected = F.normalize(method.projections[0](rows[0]), dim=-1) - F.normalize(rows[1], dim=-1)
    torch.testing.assert_close(losses["loss"], expected.abs().mean())


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_shared_decoder_generates_features_and_leaves_the_pixels_alone(share: float) -> None:
    """One pass of the decoder gives 12 or 48 patches' pixels and 16 patches' features; apart, it gives the same."""
    method, teacher, split, images = build("amd cross shared with class token")
    initialize(method, seed=0)
    method.pixels = replace(method.pixels, predict_ratio=share)
    target = teacher(images, split)
    losses = method(images, split, target)
    torch.testing.assert_close(losses["pixels"], MAE.forward(method, images, split)["pixels"])
    tokens, _ = method.encoder(normalize(images, method.mean, method.std), split.student)
    _, rows = method.decoder(tokens, split, split.order[:, 16:32], num_pixels=4)
    for i, (s, t) in enumerate(((0, 1), (2, 3))):
        expected = (method.generators[i](rows) - target[t][:, 17:]).square().mean()
        torch.testing.assert_close(losses[f"generate/{s}"], expected)


def test_a_shared_decoder_without_a_pixel_loss_computes_no_pixels() -> None:
    method, teacher, split, images = build("amd cross shared")
    initialize(method, seed=0)
    expected = losses_of(method, teacher, split, images)
    method.pixels = replace(method.pixels, weight=0.0)
    losses = losses_of(method, teacher, split, images)
    losses["loss"].backward()
    assert losses.keys() == expected.keys() - {"pixels"} and method.decoder.head.weight.grad is None
    torch.testing.assert_close(losses["loss"], expected["loss"] - expected["pixels"])
    torch.testing.assert_close(losses["generate/0"], expected["generate/0"])


@pytest.mark.parametrize("case", ["amd", "amd cross shared"])
def test_amd_that_generates_nothing_has_the_other_terms_and_no_generators(case: str) -> None:
    method, teacher, split, images = build(case)
    initialize(method, seed=0)
    parts = {"pixels": method.pixels, "align": method.align}
    alone = AMD(method.encoder, method.decoder, **parts, generate=replace(method.generate, weight=0.0))
    alone.projections = method.projections
    losses, expected = losses_of(alone, teacher, split, images), losses_of(method, teacher, split, images)
    assert len(alone.generators) == 0 and losses.keys() == expected.keys() - {"generate/0", "generate/2"}
    torch.testing.assert_close({**losses, "loss": 0}, {name: expected[name] for name in losses} | {"loss": 0})
    torch.testing.assert_close(losses["loss"], losses["pixels"] + (losses["align/0"] + losses["align/2"]) / 2)


@pytest.mark.parametrize(
    "case", ["dmae", "tinymim", "amd cross partial", "amd cross partial shared"]
)  # MAE's graph is a part of each
def test_student_and_teacher_are_captured_as_whole_graphs(case: str) -> None:
    """No graph breaks under torch.compile; the backend that only replays the graph needs no compiler."""
    method, teacher, split, images = build(case)
    initialize(method, seed=0)
    expected = losses_of(method, teacher, split, images)
    teacher.compile(backend="eager", fullgraph=True)
    method.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(losses_of(method, teacher, split, images), expected)
    torch.compiler.reset()
