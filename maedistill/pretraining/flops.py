"""Floating-point operations of one image in one training step, counted by torch on the meta device.

A multiply-add counts as two. The meta device computes nothing and copies no weight, so a ViT-L takes one second.
"""

import re

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from maedistill.methods.mae import MAE
from maedistill.models.flops import on_meta
from maedistill.models.masking import PatchSplit


def count_flops(method: MAE, *teachers: nn.Module, num_student: int, num_teacher: int) -> dict[str, float]:
    """Count GFLOP per image of a method and its teachers (or `benchmark/plain_step.py`'s), by part and in `total`.

    Parts are the forward passes of `teacher`, `teacher2` ... and of the method's children (`encoder`, `decoder`,
    `projections`, `generators`) and the whole `backward` pass. num_student and num_teacher are the visible patches S
    and T.
    """
    size, num_patches = method.encoder.grid * method.encoder.patch_size, method.encoder.grid**2
    images = torch.empty(1, 3, size, size, device="meta")
    split = PatchSplit(torch.empty(1, num_patches, dtype=torch.int64, device="meta"), num_student, num_teacher)
    counts: dict[str, float] = {}
    targets = []
    for number, network in enumerate(teachers, 1):
        with FlopCounterMode(display=False) as counter:
            targets.append(on_meta(network)(images, split))
        counts["teacher" if number == 1 else f"teacher{number}"] = counter.get_total_flops() / 1e9
    shapes = on_meta(method)
    with FlopCounterMode(display=False) as counter:
        loss = shapes(images, split, *targets)["loss"]
    by_module = counter.get_flop_counts()
    for name, _ in shapes.named_children():
        # An item of a module list has a key of its own, since the list itself is never called.
        own = re.compile(rf"{type(shapes).__name__}\.{name}(\.\d+)?")
        counts[name] = sum(sum(ops.values()) for key, ops in by_module.items() if own.fullmatch(key)) / 1e9
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    counts["backward"] = counter.get_total_flops() / 1e9
    return counts | {"total": sum(counts.values())}
