"""Build networks on the meta device: only shapes, without time or memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_INITIALIZERS = {"normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "copy_", "fill_", "zero_"}


@contextmanager
def meta_device() -> Iterator[None]:
    """Build modules on the meta device, without the arithmetic of their initialisation.

    torch alone works through it in Python, on tensors that hold nothing: 0.4 s for a ViT-L, 0.08 s without.
    """
    with torch.device("meta"), _NoArithmetic():
        yield


class _NoArithmetic(TorchFunctionMode):
    """Skips the functions that initialise a tensor in place."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return a meta tensor as it is from one of these functions; call every other function."""
        given = kwargs or {}
        tensor = args[0] if args else given.get("tensor")  # torch.nn.init names it
        if getattr(func, "__name__", "") in _INITIALIZERS and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **given)
