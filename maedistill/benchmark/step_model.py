"""A model of a training step's time on an H100: operations are counted here, their time is modelled, not measured.

    config -> the true step on tensors without data -> every operation: FLOPs, bytes, kernels -> seconds, by kind

Nothing is computed, so this takes a minute of one core and no GPU. The model is a roofline. An operation takes the time
to move its bytes at memory speed, and at least that of a kernel launch. A matrix product or attention also takes at
least the time of its FLOPs at the share of the peak that such shapes reach on this card. The peaks come from the data
sheet of the H100 SXM; the shares are assumed. Clipping and the exchange of gradients are left out. The model describes
the eager step: torch.compile fuses everything but products and attention.
"""

import math
from collections import defaultdict, deque
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from maedistill.benchmark.training_step import SyntheticTraining
from maedistill.config.pretrain import PretrainConfig

CARD = "H100 SXM"
PEAK_FLOPS = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12}  # dense, from the data sheet
PRODUCT_SHARE, ATTENTION_SHARE = 0.58, 0.30  # share of the peak that is reached, assumed
BANDWIDTH = 0.85 * 3.35e12  # bytes per second that a long copy reaches, assumed
LAUNCH_SECONDS = 2.5e-6  # shortest time of a kernel
_TILE = 128  # rows that attention processes at once: fewer rows take as long

_NO_KERNEL = {"_unsafe_view", "device", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "linear"),
    "layer norm": ("native_layer_norm", "native_layer_norm_backward"),
    "GELU": ("gelu", "gelu_backward"),
    "casts and copies": ("_to_copy", "copy_", "clone", "cat", "stack"),
    "adds": ("add", "add_"),
}
_KIND = {name: kind for kind, names in _KINDS.items() for name in names}


@dataclass(frozen=True)
class Kind:
    """All operations of one kind in a step."""

    kernels: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Kind") -> "Kind":
        return Kind(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))


def model_step(config: PretrainConfig, *, batch: int) -> dict[str, Kind]:
    """Model one step of `batch` images in bf16, by kind of operation. Weights that would be downloaded are random."""
    bf16 = {"precision": "bf16"}
    sections = {"teacher": config.teacher.model_copy(update=bf16), "engine": config.engine.model_copy(update=bf16)}
    training = SyntheticTraining(config.model_copy(update=sections), torch.device("cpu"))
    step, numbers = training.bare_step(), training.num_parameters
    with FakeTensorMode(allow_non_fake_inputs=True):
        training.set_batch_size(batch)
        with _Counter() as counter:
            deque(step.gradients(), maxlen=0)
    # The fused update reads weight, gradient and two moments, and writes all but the gradient, 4 bytes each.
    moved = 7 * 4.0 * numbers
    return {**counter.kinds, "AdamW": Kind(max(1, numbers // 10**7), 0.0, moved, moved / BANDWIDTH)}


class _Counter(TorchDispatchMode):
    """A counter that adds up all operations that run inside it, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, Kind] = defaultdict(Kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in _NO_KERNEL or func.is_view:
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        kernels, flops, moved = 1, 0.0, sum(map(_touched, inputs + outputs))
        bound = moved / BANDWIDTH
        if "attention" in name:
            q, k = [tensor for tensor in inputs if tensor.ndim == 4][:2]
            flops, padded = _attention_flops(q, k, backward="backward" in name)
            bound = max(bound, padded / (ATTENTION_SHARE * PEAK_FLOPS[torch.bfloat16]))
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            bound = max(bound, flops / (PRODUCT_SHARE * PEAK_FLOPS[inputs[0].dtype]))
        elif name in ("native_layer_norm_backward", "sort"):
            kernels = 2
        kind = "attention" if "attention" in name else _KIND.get(name, "other elementwise, reductions")
        self.kinds[kind] += Kind(kernels, flops, moved, max(bound, kernels * LAUNCH_SECONDS))
        return out


def _attention_flops(q: Tensor, k: Tensor, *, backward: bool) -> tuple[float, float]:
    """Count the FLOPs of attention of [B, heads, Q, d] and [B, heads, K, d]: exact, and with rows padded to full tiles.

    There are two products in the forward pass and five in the backward pass.
    """
    (batch, num_heads, queries, width), keys = q.shape, k.shape[2]
    flops = (5 if backward else 2) * 2.0 * batch * num_heads * queries * keys * width
    tiles = math.prod(math.ceil(rows / _TILE) * _TILE / rows for rows in (queries, keys))
    return flops, flops * tiles


def _touched(tensor: Tensor) -> int:
    """Return the bytes that are really read or written: expanded dimensions count once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()
