"""Floating-point operations of a forward pass, counted by torch on the meta device. A multiply-add counts as two."""

import copy
import itertools

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from maedistill.models.vits import PlainViT


def forward_gflop(vit: PlainViT) -> float:
    """Count the GFLOP of one image's forward pass."""
    images = torch.empty(1, 3, *vit.patch_embed.img_size, device="meta")  # [1, 3, s, s]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta(vit).eval()(images)
    return counter.get_total_flops() / 1e9


def on_meta(module: nn.Module) -> nn.Module:
    """Copy `module` to the meta device. The deep copy takes the tensors from its memo, so it copies no weights."""
    memo = {}
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)
