"""A model of a training step's time on an H100: operations are counted here, their time is modelled, not measured.

    config -> the true step on tensors without data -> every operation: FLOPs, bytes, kernels -> seconds, by kind

Nothing is computed, so this takes a minute of one core and no GPU. The model is a roofline. An operation takes the time
to move its bytes at memory speed, and at least that of a kernel launch. A matrix product or attention also takes at
least the time of its FLOPs at the share of the peak that such shapes reach on this card. The peaks come from the data
sheet of the H100 SXM; the shares are assumed. Clipping and the exchange of gradients are left out. The model describes
the eager step: torch.compile fuses everything but products and attention.

    B images
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from maedistill.config.pretrain import PretrainConfig
from maedistill.pretraining.build import build_encoder, build_method, build_teacher, build_teacher_source, step_inputs

CARD = "H100 SXM"
PEAK_FLOPS = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12}  # dense, from the data sheet
PRODUCT_SHARE, ATTENTION_SHARE = 0.58, 0.30  # share of the peak that is reached, assumed
BANDWIDTH = 0.85 * 3.35e12  # bytes per second that a long copy reaches, assumed
LAUNCH_SECONDS = 2.5e-6  # shortest time of a kernel
_TILE = 128  # rows that attention processes at once: fewer rows take as long

_VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"}
_VIEWS |= {"detach", "alias", "unbind", "split", "split_with_sizes", "as_strided", "lift_fresh", "device"}
_VIEWS |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # no views, but no kernels either
_KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "linear"),
    "layer norm": ("native_layer_norm", "native_layer_norm_backward"),
    "GELU": ("gelu", "gelu_backward"),
    "casts and copies": ("_to_copy", "copy_", "clone", "cat", "stack"),
    "adds": ("add", "add_"),
}


@dataclass
class Kind:
    """All operations of one kind in a step."""

    kernels: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Kind") -> "Kind":
        return Kind(
            self.kernels + other.kernels,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
        )


def model_step(config: PretrainConfig, *, batch: int) -> dict[str, Kind]:
    """Model one step of `batch` images in bf16: images and masks, teacher, forward, backward, AdamW; by kind."""
    teacher_in_bf16 = config.teacher.model_copy(update={"precision": "bf16"})
    config = config.model_copy(update={"teacher": teacher_in_bf16})
    encoder = build_encoder(config)
    source = build_teacher_source(config, grid=encoder.grid)
    method = build_method(config, encoder, source)
    teacher = build_teacher(config, source, torch.device("cpu")) if source is not None else None
    side = config.data.image_size
    with FakeTensorMode():
        numbers = sum(p.numel() for p in without_data(method).parameters())
        if teacher is not None:
            without_data(teacher)
        pixels, positions = torch.empty(batch, 3, side, side, dtype=torch.uint8), torch.arange(batch)
        with _Count() as count:
            images, split = step_inputs(config, pixels, positions, num_patches=encoder.grid**2)
            target = teacher(images, split) if teacher is not None else None
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = method(images, split, target)["loss"]
            loss.backward()
    return {**count.kinds, "AdamW": _adamw(numbers)}


def total(kinds: dict[str, Kind]) -> Kind:
    """Add up all kinds."""
    return sum(kinds.values(), Kind())


def without_data(module: nn.Module) -> nn.Module:
    """Replace every tensor of `module`, in place, by one of the same shape without data. Call in a FakeTensorMode."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return module


class _Count(TorchDispatchMode):
    """A counter that adds up all operations that run inside it, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, Kind] = defaultdict(Kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name not in _VIEWS and not func.is_view:
            given, made = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), out))
            self.kinds[_kind_of(name)] += _operation(func, name, args, kwargs or {}, out, given, made)
        return out


def _operation(
    func: Any, name: str, args: Any, kwargs: Any, out: Any, given: Sequence[Tensor], made: Sequence[Tensor]
) -> Kind:
    """Count one operation: FLOPs, bytes read and written, kernels, seconds."""
    moved = sum(map(_touched, itertools.chain(given, made)))
    dtype = next((t.dtype for t in given if t.is_floating_point()), torch.float32)
    kernels, flops, bound = 1, 0.0, moved / BANDWIDTH
    if "attention" in name:
        q, k = [t for t in given if t.ndim == 4][:2]
        flops, padded = _attention_flops(q, k, backward="backward" in name)
        bound = max(bound, padded / (ATTENTION_SHARE * PEAK_FLOPS[torch.bfloat16]))
    elif func._overloadpacket in flop_registry:
        flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        bound = max(bound, flops / (PRODUCT_SHARE * PEAK_FLOPS.get(dtype, PEAK_FLOPS[torch.float32])))
    elif name in ("native_layer_norm_backward", "sort"):
        kernels = 2
    return Kind(kernels, flops, moved, max(bound, kernels * LAUNCH_SECONDS))


def _attention_flops(q: Tensor, k: Tensor, *, backward: bool) -> tuple[float, float]:
    """Count the FLOPs of attention of [B, heads, Q, d] and [B, heads, K, d]: exact, and with rows padded to full tiles.

    There are two products in the forward pass and five in the backward pass.
    """
    (batch, num_heads, queries, width), keys = q.shape, k.shape[2]
    flops = (5 if backward else 2) * 2.0 * batch * num_heads * queries * keys * width
    tiles = math.prod(math.ceil(rows / _TILE) * _TILE / rows for rows in (queries, keys))
    return flops, flops * tiles


def _adamw(numbers: int) -> Kind:
    """Model the fused update: read weight, gradient and two moments, write all but the gradient, 4 bytes each."""
    moved = 7 * 4.0 * numbers
    return Kind(max(1, numbers // 10**7), 0.0, moved, moved / BANDWIDTH)


def _touched(tensor: Tensor) -> int:
    """Return the bytes that are really read or written: expanded dimensions count once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def _kind_of(name: str) -> str:
    if "attention" in name:
        return "attention"
    return next((kind for kind, names in _KINDS.items() if name in names), "other elementwise, reductions")
