"""Teachers that see whole images: their maps on the student's grid, a step with them, and those that cannot teach."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError
from maedistill.methods.mae import MAE
from maedistill.methods.teacher import Teacher
from maedistill.models.maps import resample
from maedistill.pretraining.build import (
    build_encoder,
    build_method,
    build_teacher,
    build_teacher_source,
    split_of,
)
from maedistill.pretraining.flops import count_flops
from maedistill.runs.objects import Objects

GRID, CPU = 8, torch.device("cpu")
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SAM = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "neck_chans": 16, "num_classes": 0}
SAM |= {"window_size": 3, "global_attn_indexes": (1,)}  # 5 x 5 patches are no whole windows: SAM pads them inside
# A small model of each family, the image size it sees, the depth that teaches, and that map's side.
FAMILIES = {
    "sam block": ("samvit_base_patch16", SAM, 40, 1, 5),
    "sam neck": ("samvit_base_patch16", SAM, 64, 2, 8),
    "sam2": ("sam2_hiera_tiny", {"embed_dim": 16, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)}, 64, 1, 8),
    "hiera": ("hiera_tiny_224", {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1), "img_size": 64}, 64, 2, 4),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}, 56, 0, 14),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 96, 3, 3),
    "resnet": ("resnet10t", {}, 64, 4, 2),
}


def network_of(family: str) -> tuple[nn.Module, int, int, int]:
    name, arguments, size, depth, side = FAMILIES[family]
    torch.manual_seed(0)
    sized = {"img_size": size} if name.startswith(("sam", "swin")) and "sam2" not in name else {}
    return timm.create_model(name, **arguments | sized).eval(), size, depth, side


def parts(
    network: nn.Module | str, depths: list[int], *, method: str = "amd", size: int | None = None, **sections: Any
) -> tuple[PretrainConfig, MAE, Teacher]:
    """Config, method and teacher of a student of 8 x 8 patches of 4 pixels. network: the teacher, or its source."""
    shape = {"width": 32, "depth": 2, "num_heads": 2}
    masks = {"student_keep_ratio": 0.25, "teacher_keep_ratio": 1.0 if method == "amd" else None}
    source = network if isinstance(network, str) else "python:given"
    given = {
        "method": method,
        "data": {"image_size": 32},
        "student": {"model": "vit_tiny_patch16_224", "patch_size": 4, **shape},
        "teacher": {"source": source, "image_size": size, **sections.pop("teacher", {})},
        "decoder": {"width": 16, "depth": 1, "num_heads": 2},
        "masks": masks,
        "align": {"student": tuple(range(len(depths))), "teacher": tuple(depths)},
        "generate": {"num_heads": 1},
    }
    config, objects = PretrainConfig(**given | sections), Objects(teachers=() if network is source else (network,))
    encoder = build_encoder(config)
    opened = build_teacher_source(config, grid=encoder.grid, objects=objects)
    assert opened is not None
    return config, build_method(config, encoder, opened), build_teacher(config, opened, CPU)


def centres(side: int) -> Tensor:
    """Two maps whose values are the column and the row of each cell's centre, from 0 to 1: [2, h, h]."""
    at = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(at, at, indexing="xy"))


@pytest.mark.parametrize(("side", "grid"), [(2, 8), (5, 14), (7, 14), (14, 14), (14, 8), (16, 14), (64, 14), (56, 7)])
def test_a_ramp_stays_a_ramp_up_to_the_border(side: int, grid: int) -> None:
    torch.testing.assert_close(resample(centres(side)[None], grid)[0], centres(grid), rtol=0, atol=1e-6)


def test_maps_are_interpolated_inside_and_averaged_over_patches() -> None:
    maps = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    inside = F.interpolate(maps, size=15, mode="bilinear")[..., 1:-1, 1:-1]
    torch.testing.assert_close(resample(maps, 15)[..., 1:-1, 1:-1], inside)
    torch.testing.assert_close(resample(maps, 2), F.avg_pool2d(maps, 3))
    torch.testing.assert_close(resample(maps[..., :1, :1], 3), maps[..., :1, :1].expand(-1, -1, 3, 3))
    half = resample(maps.bfloat16(), 15)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), resample(maps, 15), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_timms_own_features_at_the_patches_of_the_split(family: str) -> None:
    network, size, depth, side = network_of(family)
    config, _, teacher = parts(network, [depth], size=size)
    split = split_of(config, torch.arange(2), GRID**2)
    seen = vision.resize(IMAGES, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        if family == "sam neck":
            own = network.forward_features((seen - mean) / std)
        else:
            own = network.forward_intermediates((seen - mean) / std, indices=[depth], intermediates_only=True)[0]
    assert own.shape[2:] == (side, side) and teacher.width == own.shape[1] and teacher.num_prefix == 0
    rows = resample(own, GRID).flatten(2).mT  # [B, N, D]
    expected = torch.stack([one[order] for one, order in zip(rows, split.order, strict=True)])
    torch.testing.assert_close(teacher(IMAGES, split)[depth], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["sam neck", "sam2"])
def test_such_a_teacher_is_captured_as_a_whole_graph(family: str) -> None:
    network, size, depth, _ = network_of(family)
    config, _, teacher = parts(network, [depth], size=size)
    split = split_of(config, torch.arange(2), GRID**2)
    expected = teacher(IMAGES, split)
    teacher.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(teacher(IMAGES, split), expected)
    torch.compiler.reset()


@pytest.mark.parametrize(("family", "method"), [*((family, "amd") for family in FAMILIES), ("resnet", "dmae")])
def test_a_step_reaches_the_student_and_is_counted(family: str, method: str) -> None:
    network, size, depth, _ = network_of(family)
    config, module, teacher = parts(network, [depth], method=method, size=size)
    split = split_of(config, torch.arange(2), GRID**2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted on a CPU
        target = teacher(IMAGES, split)
    assert target[depth].shape[1] == split.num_teacher == (GRID**2 if method == "amd" else GRID**2 // 4)
    losses = module(IMAGES, split, target)
    assert losses.keys() == {"loss", "pixels", "align/0", *(["generate/0"] if method == "amd" else [])}
    (losses["loss"] - losses["pixels"]).backward()
    student = dict(module.encoder.vit.blocks[0].named_parameters())
    assert not [name for name, p in student.items() if not p.grad.abs().sum() > 0]
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    counted = count_flops(module, teacher, num_student=split.num_student, num_teacher=split.num_teacher)
    assert counted["teacher"] == pytest.approx(counter.get_total_flops() / 1e9 / 2)


def test_with_dmae_a_share_of_1_is_the_same_as_none() -> None:
    losses = []
    for share in (None, 1.0):
        masks = {"student_keep_ratio": 0.25, "teacher_keep_ratio": share}
        config, module, teacher = parts("random:test_convnext", [2], method="dmae", size=64, masks=masks)
        split = split_of(config, torch.arange(2), GRID**2)
        losses.append(module(IMAGES, split, teacher(IMAGES, split)))
    torch.testing.assert_close(*losses)


def test_the_remedies_for_a_map_of_one_cell_work() -> None:
    for depth, size in ((2, 32), (3, 64)):
        config, _, teacher = parts("random:test_convnext", [depth], method="dmae", size=size)
        rows = teacher(IMAGES, split_of(config, torch.arange(2), GRID**2))[depth]
        assert rows.std(dim=1).mean() > 0


def test_two_depths_of_sam() -> None:
    network, size, _, _ = network_of("sam block")
    config, module, teacher = parts(network, [1, 0], size=size)
    split = split_of(config, torch.arange(2), GRID**2)
    target = teacher(IMAGES, split)
    own = network.forward_intermediates(teacher.prepare(IMAGES), intermediates_only=True)
    for depth in (0, 1):
        rows = resample(own[depth], GRID).flatten(2).mT
        torch.testing.assert_close(target[depth][0], rows[0, split.order[0]])
    assert {"align/0", "generate/1"} <= module(IMAGES, split, target).keys()


def test_a_random_network_is_the_same_every_time() -> None:
    first, again = (parts("random:test_convnext", [2], method="dmae", size=64)[2] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_teacher_sees_images_of_the_size_that_is_set_or_of_its_own() -> None:
    assert parts("random:test_convnext", [2], method="dmae", size=64)[2].image_size == 64
    assert parts("random:test_convnext", [2], method="dmae")[2].image_size == 160, "its own"
    given = timm.create_model("test_convnext")
    assert parts(given, [2], method="dmae")[2].image_size == 32, "what it was trained on is not known: the student's"


DMAE_OF_ALL = {"method": "dmae", "masks": {"student_keep_ratio": 0.25, "teacher_keep_ratio": 1.0}}


class Flat(nn.Module):
    """Features without a map."""

    def forward_intermediates(self, images: Tensor, **_: object) -> list[Tensor]:
        return [images.flatten(1)]


@pytest.mark.parametrize(
    ("network", "depths", "more", "cause", "remedy"),
    [
        ("random:test_convnext", [4], {}, "align.teacher: depth 4 does not exist", "use 0 to 3"),
        ("random:test_convnext", [1, 3], {}, "align.teacher: the depths [1, 3]", "align.teacher=[3]"),
        ("random:test_convnext", [3], {"teacher": {"width": 64}}, "teacher.width: ", "remove it"),
        ("random:test_convnext", [3], {"masks": {"teacher_keep_ratio": 0.5}}, "masks.teacher_keep_ratio: 0.5", "=1"),
        (
            "random:test_convnext",
            [3],
            {"align": {"student": (1,), "teacher": (3,), "last_blocks": 2}},
            "align.last_blocks: ",
            "set align.last_blocks=null",
        ),
        (
            "random:test_convnext",
            [3],
            {"align": {"student": (1,), "teacher": (3,), "output": "mlp"}},
            "align.output: in random:test_convnext no block",
            "align.output=block",
        ),
        ("random:test_convnext", [3], {"size": 32}, "align.teacher: at depth 3", "depths up to 2, or set a larger"),
        ("random:resnet10t", [0], {"size": 2}, "align.teacher: at depth 0", "set a larger teacher.image_size"),
        (
            "random:vit_tiny_patch16_224",
            [3],
            DMAE_OF_ALL,
            "masks.teacher_keep_ratio: 1",
            "remove it, or use method=amd",
        ),
        ("random:test_convnext", [3], {"method": "tinymim"}, "method: tinymim", "method=dmae"),
        ("random:test_convnxt", [3], {}, "timm has no model", "test_convnext"),
        (Flat, [0], {}, "teacher.source: ", "maedistill.Encoder"),
        (nn.Identity, [0], {}, "no forward_intermediates", "maedistill.Encoder"),
        (partial(timm.create_model, "test_resnet", in_chans=1), [3], {}, "1 channels", "3 channels"),
        (
            partial(timm.create_model, "test_vit", img_size=64),
            [3],
            {},
            "4 patches along a side, the student 8",
            "image size",
        ),
        ("random:swin_tiny_patch4_window7_224", [3], {"size": 90}, "90", "teacher.image_size=88"),
        ("random:vit_tiny_patch16_224", [3], {"size": 64}, "64", "128"),
        ("random:hiera_tiny_224", [3], {"size": 100}, "100 pixels", "which is then 224"),
    ],
)
def test_what_cannot_teach_is_refused(
    network: Callable[[], nn.Module] | str, depths: list[int], more: dict[str, Any], cause: str, remedy: str
) -> None:
    teacher = network if isinstance(network, str) else network()
    with pytest.raises(ConfigError) as error:
        parts(teacher, depths, **more)
    assert cause in error.value.cause and remedy in error.value.remedy
