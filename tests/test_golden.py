"""MAE, DMAE and AMD against reference numbers of the published methods, gradients included.

The files are described in tests/golden/README.md. `MAEDISTILL_GOLDEN=DIR pytest tests/test_golden.py` compares with
another folder of the same file names: the same architectures, other weights and images. They are loaded through the
importer, so this tests it too. Compared in fp32 on the CPU: max|a - b| <= 1e-5 * max|b|.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from maedistill.methods.amd import AMD, GeneratorSpec
from maedistill.methods.dmae import DMAE, AlignmentSpec
from maedistill.methods.mae import MAE, PixelSpec, pixel_target
from maedistill.methods.teacher import Teacher
from maedistill.models.decoder import TokenDecoder
from maedistill.models.encoder import MaskedEncoder
from maedistill.models.initialize import initialize
from maedistill.models.masking import PatchSplit
from maedistill.models.patches import patchify
from maedistill.models.vits import build_vit
from maedistill.weights.from_file import EncoderSpec, read_weights_file
from maedistill.weights.open_network import open_network
from maedistill.weights.state_dict import ConvertedStateDict, import_weights
from tests.support.golden import GOLDEN

VIT = "vit_tiny_patch16_224"
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # MAE's and DMAE's images are normalised already


def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def imported(name: str) -> ConvertedStateDict:
    path = GOLDEN / f"{name}.pth"
    return import_weights(read_weights_file(path), name=str(path))


def close(ours: Tensor | float, theirs: np.ndarray, name: str) -> None:
    ours, expected = torch.as_tensor(ours).detach().numpy(), np.asarray(theirs)
    assert ours.shape == expected.shape, name
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    print(f"{name}: {error:.1e}")
    assert error <= 1e-5, f"{name}: off by {error:.1e} of its largest value"


def encoder(width: int, depth: int, num_heads: int, *, class_token: bool, pos_embed: str) -> MaskedEncoder:
    shape = {"width": width, "depth": depth, "num_heads": num_heads, "patch_size": 4}
    return MaskedEncoder(build_vit(VIT, image_size=32, pos_embed=pos_embed, class_token=class_token, **shape))


def decoder(width: int, *, num_prefix: int, pos_embed: str, bias: bool) -> TokenDecoder:
    shape = {"width": 16, "depth": 1, "num_heads": 2, "grid": 8, "patch_size": 4}
    return TokenDecoder(width, **shape, num_prefix=num_prefix, pos_embed=pos_embed, bias=bias)


def student(width: int, depth: int, *, amd: bool = False) -> tuple[MaskedEncoder, TokenDecoder]:
    pos_embed = "sincos1d" if amd else "sincos2d"
    ours = encoder(width, depth, 2, class_token=not amd, pos_embed=pos_embed)
    return ours, decoder(width, num_prefix=ours.num_prefix, pos_embed=pos_embed, bias=not amd)


def load(method: MAE, name: str) -> MAE:
    """All of the file into all of the method, nothing left over but AMD's tables, which its files do not hold."""
    initialize(method, seed=0)
    content = imported(name)
    assert not content.foreign
    missing, unexpected = method.load_state_dict(content.weights, strict=False)
    assert not unexpected and all(key.endswith("pos_embed") for key in missing)
    return method


def teacher(name: str, spec: EncoderSpec, *, taps: tuple[int, ...], **normalization) -> Teacher:
    source = open_network(f"file:{GOLDEN / name}.pth", "encoder", grid=8, spec=spec)
    return Teacher(replace(source, **normalization), taps=taps)


def all_predictions(method: MAE, images: Tensor, split: PatchSplit) -> Tensor:
    """Return predictions of every patch in raster order; the method itself never predicts a visible one."""
    tokens, _ = method.encoder(images, split.student)
    rows = method.decoder.head(method.decoder.norm(method.decoder.rows(tokens, split)))[:, method.encoder.num_prefix :]
    return torch.empty_like(rows).scatter_(1, split.order[..., None].expand_as(rows), rows)


def masked_split(gold: dict[str, np.ndarray]) -> PatchSplit:
    order = torch.from_numpy(gold["noise"]).argsort(dim=1)
    split = PatchSplit(order, 16, 16)
    assert np.array_equal(order.argsort(dim=1).numpy(), gold["ids_restore"])
    removed = torch.ones(order.shape).scatter_(1, split.student, 0.0)
    assert np.array_equal(removed.numpy(), gold["mask"])
    return split


@pytest.mark.parametrize("kind", ["normpix", "rawpix"])
def test_mae(kind: str) -> None:
    gold = reference(f"mae_{kind}")
    method = MAE(*student(32, 3), pixels=PixelSpec(**PLAIN, target="norm_patch" if kind == "normpix" else "raw"))
    load(method, f"mae_{kind}")
    images, split = torch.from_numpy(gold["images"]), masked_split(gold)
    losses = method(images, split)
    losses["loss"].backward()
    close(method.encoder(images, split.student)[0], gold["latent"], "latent")
    close(all_predictions(method, images, split), gold["pred"], "pred")
    close(losses["loss"], gold["loss"], "loss")
    close(method.encoder.vit.patch_embed.proj.weight.grad, gold["grad_patch_embed"], "grad_patch_embed")
    close(method.encoder.vit.blocks[0].attn.qkv.weight.grad, gold["grad_qkv0"], "grad_qkv0")
    close(method.decoder.head.weight.grad, gold["grad_decoder_pred"], "grad_decoder_pred")
    close(method.decoder.mask_token.grad, gold["grad_mask_token"], "grad_mask_token")


@pytest.mark.parametrize("distance", ["L1", "L2"])
def test_dmae(distance: str) -> None:
    name = f"dmae_{distance}"
    gold = reference(name)
    guide = teacher(f"{name}_teacher", EncoderSpec(VIT, 48, 4, 4, patch_size=4), taps=(2,), **PLAIN)
    align = AlignmentSpec(
        student_taps=(1,),
        teacher_taps=(2,),
        teacher_width=guide.width,
        teacher_prefix=guide.num_prefix,
        class_token=True,
        distance="l1" if distance == "L1" else "mse",
        normalize="l2",
    )
    method = DMAE(*student(32, 3), pixels=PixelSpec(**PLAIN, target="raw"), align=align)
    load(method, f"{name}_student")
    images, split = torch.from_numpy(gold["images"]), masked_split(gold)
    assert np.array_equal(split.student.numpy(), gold["ids_keep"])
    target = guide(images, split)
    losses = method(images, split, target)
    losses["loss"].backward()
    close(target[2], gold["teacher_feature_block2"], "teacher_feature_block2")
    close(all_predictions(method, images, split), gold["pred"], "pred")
    close(losses["pixels"], gold["reconstruction_loss"], "reconstruction_loss")
    close(losses["align/1"], gold["alignment_loss"], "alignment_loss")
    close(losses["loss"], gold["reconstruction_loss"] + gold["alignment_loss"], "loss")
    close(method.encoder.vit.patch_embed.proj.weight.grad, gold["grad_patch_embed"], "grad_patch_embed")
    close(method.encoder.vit.blocks[0].attn.qkv.weight.grad, gold["grad_qkv0"], "grad_qkv0")
    close(method.projections[0].weight.grad, gold["grad_projection"], "grad_projection")


def in_raster_order(rows: Tensor, ids: Tensor) -> Tensor:
    """Return rows [B, M, D] sorted by patch id [B, M], as the published AMD code has them."""
    return torch.gather(rows, 1, ids.argsort(dim=1)[..., None].expand_as(rows))


def test_amd() -> None:
    gold = reference("amd")
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
    spec = EncoderSpec(VIT, 64, 4, 4, patch_size=4, pos_embed="sincos1d")
    guide = teacher("amd_teacher", spec, taps=(1, 3))
    pixels = PixelSpec(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, target="norm_patch_channel")
    align = AlignmentSpec(
        student_taps=(0, 1),
        teacher_taps=(1, 3),
        teacher_width=guide.width,
        teacher_prefix=guide.num_prefix,
        class_token=False,
        distance="mse",
        normalize="none",
        bias=False,
    )
    generate = GeneratorSpec(num_heads=1, depth=1, pos_embed="sincos1d")
    method = AMD(*student(32, 2, amd=True), pixels=pixels, align=align, generate=generate)
    load(method, "amd_student")
    images = torch.from_numpy(gold["images"]) * std + mean
    split = PatchSplit(torch.from_numpy(gold["order"]), 16, 32)
    for ids, seen in ((split.student, ~gold["student_masked"]), (split.teacher, ~gold["teacher_masked"])):
        assert np.array_equal(torch.zeros(4, 64).bool().scatter_(1, ids, True).numpy(), seen)
    between = split.order[:, 16:32]
    assert np.array_equal(torch.zeros(4, 64).bool().scatter_(1, between, True).numpy(), gold["difference"])
    for table, width in (("encoder", 32), ("teacher", 64), ("decoder", 16), ("generator", 64)):
        ours = {"encoder": method.encoder.vit, "teacher": guide.encoder.vit, "decoder": method.decoder}
        close(ours.get(table, method.generators[0]).pos_embed, gold[f"{table}_pos_embed"], f"{table} {width}")

    target = guide(images, split)
    losses = method(images, split, target)
    losses["loss"].backward()
    _, tapped = method.reconstruct(images, split, (0, 1))
    projected = method.project(tapped)
    for i, tap in enumerate((1, 3)):
        rows = target[tap]
        close(in_raster_order(rows[:, :16], split.student), gold[f"teacher_direct_{i}"], f"teacher_direct_{i}")
        close(in_raster_order(rows[:, 16:], between), gold[f"teacher_generation_{i}"], f"teacher_generation_{i}")
        close(in_raster_order(projected[i], split.student), gold[f"student_direct_{i}"], f"student_direct_{i}")
        generated = method.generators[i](projected[i], split)
        close(in_raster_order(generated, between), gold[f"student_generation_{i}"], f"student_generation_{i}")
    normalized = (images - mean) / std
    predicted = method.decoder(method.encoder(normalized, split.student)[0], split)
    close(in_raster_order(predicted, split.hidden), gold["reconstruction"], "reconstruction")
    hidden = torch.gather(patchify(images, 4), 1, split.hidden.sort(dim=1).values[..., None].expand(-1, -1, 48))
    close(pixel_target(hidden, kind="norm_patch_channel"), gold["reconstruction_target"], "reconstruction_target")
    close(losses["pixels"], gold["loss_reconstruction"], "loss_reconstruction")
    close((losses["align/0"] + losses["align/1"]) / 2, gold["loss_direct"], "loss_direct")
    close((losses["generate/0"] + losses["generate/1"]) / 2, gold["loss_generation"], "loss_generation")
    close(losses["loss"], gold["loss_reconstruction"] + gold["loss_direct"] + gold["loss_generation"], "loss")
    close(method.encoder.vit.patch_embed.proj.weight.grad, gold["grad_patch_embed"][:, :, 0], "grad_patch_embed")
    close(method.projections[0].weight.grad, gold["grad_projection0"], "grad_projection0")
    close(method.generators[0].mask_token.grad, gold["grad_generator_mask_token0"], "grad_generator_mask_token0")
