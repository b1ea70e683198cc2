"""Loss and gradient of every method on the GPU, compared with the CPU in fp32: the masks and the results must agree.

B images   N patches
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_parts.check import Check
from gpu_parts.networks import tiny_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.images.transforms import random_flip, to_float01
from maedistill.methods.mae import MAE
from maedistill.methods.teacher import Teacher
from maedistill.pretraining.build import build_encoder, build_method, build_teacher, build_teacher_source, split_of

METHODS = ("mae", "dmae", "amd", "tinymim")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
BATCH = 8


@dataclass(frozen=True)
class Outcome:
    """The result of one forward and backward pass."""

    order: Tensor  # [B, N]
    loss: Tensor
    gradient: Tensor  # of all parameters, flat


def run(check: Check) -> None:
    """Compare every method in every number format."""
    for method in METHODS:
        with check.guarded(method):
            _compare(check, method)


def _compare(check: Check, method: str) -> None:
    """Compare masks, loss and gradient of a method with the CPU's."""
    config = tiny_config(method, ["teacher.precision=fp32"] if method != "mae" else [])
    module, teacher = _build(config)
    cpu = _outcome(config, module, teacher, torch.device("cpu"))
    card = _outcome(config, module, teacher, check.device)
    check.verdict(f"{method}: masks", bool((card.order.cpu() == cpu.order).all()), "equal, draw for draw")
    check.close(f"{method}: loss, fp32", card.loss, cpu.loss, bound=1e-5)
    check.close(f"{method}: gradient, fp32", card.gradient, cpu.gradient, bound=1e-3)
    for name, dtype in HALF.items():
        half = _outcome(config, module, teacher, check.device, dtype)
        check.close(f"{method}: loss, {name}", half.loss, cpu.loss, bound=2e-2)
        check.close(f"{method}: gradient, {name}", half.gradient, cpu.gradient, bound=0.1)


def _build(config: PretrainConfig) -> tuple[MAE, Teacher | None]:
    """Build the networks on the CPU."""
    encoder = build_encoder(config)
    source = build_teacher_source(config, grid=encoder.grid)
    teacher = build_teacher(config, source, torch.device("cpu")) if source is not None else None
    method, draws = build_method(config, encoder, source), torch.Generator().manual_seed(0)
    for network in filter(None, (method, teacher)):  # away from the start, where relations are uniform and agree
        for weight in (one for one in (*network.parameters(), *network.buffers()) if one.ndim == 2):
            weight.data += 0.05 * torch.randn(weight.shape, generator=draws)
    return method, teacher


def _outcome(
    config: PretrainConfig, module: MAE, teacher: Teacher | None, device: torch.device, dtype: torch.dtype | None = None
) -> Outcome:
    """Run copies of the networks on a device, under autocast if `dtype` is given."""
    module, teacher = copy.deepcopy(module).to(device), copy.deepcopy(teacher).to(device) if teacher else None
    side, generator = config.data.image_size, torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (BATCH, 3, side, side), dtype=torch.uint8, generator=generator).to(device)
    positions = (torch.arange(BATCH) + 10**9).to(device)
    images = random_flip(to_float01(pixels), positions, seed=3)
    split = split_of(config, positions, module.encoder.grid**2)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        loss = module(images, split, teacher(images, split) if teacher else None)["loss"]
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    return Outcome(split.order, loss, gradient)
