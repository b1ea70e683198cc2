"""A card without a card: tensors on the device `cpu:1`, which compute on the CPU and refuse what a GPU would refuse.

    with Card() as card:
        module.to(CARD)             # copies are free here, and counted
        with card.step():
            module(images)          # here nothing may wait for the card: `Waits` is raised

Everywhere, a CPU tensor that meets one of the card raises `MixesDevices`; but a number (0-dim) may enter an operation
that works element by element, as on a GPU. Values come from the CPU's own kernels, so they must equal the CPU's bit by
bit, under autocast, too. `cpu:1` is a device that torch knows and nobody has: nothing is registered, autocast and the
backward pass work.

What it cannot show: waits inside of a GPU's kernels, autocast's own list of operations on CUDA, streams, memory.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import maedistill

CARD = torch.device("cpu", 1)
PACKAGE = str(Path(maedistill.__file__).parent)
_aten = torch.ops.aten
_SIZED_BY_VALUES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
_BY_INDEX = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


class Waits(AssertionError):
    """The host would have to wait for the card."""


class MixesDevices(AssertionError):
    """An operation got tensors of the CPU and of the card."""


class OnCard(Tensor):
    """A tensor of the card. `inside` is its value on the CPU."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> "OnCard":
        layout = {"strides": inside.stride(), "storage_offset": inside.storage_offset(), "dtype": inside.dtype}
        made = Tensor._make_wrapper_subclass(cls, inside.shape, **layout, device=CARD)
        made.inside = inside
        return made

    def __repr__(self) -> str:
        return f"OnCard({self.inside})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of a tensor of the card outside of `with Card()`")

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Tell torch that there is a tensor inside: `Module.to` then swaps parameters instead of their data."""
        return ["inside"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> "OnCard":
        """Make it anew of its parts."""
        return OnCard(parts["inside"])

    def tolist(self) -> Any:
        """Read, as a GPU's tensor does, by a copy: torch's own would look for memory here, as the type is `cpu`."""
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        """Refuse, as a GPU's tensor does."""
        raise TypeError("can't convert a tensor of the card to numpy: copy it to the host first")


class Card(TorchDispatchMode):
    """The card of this thread. `waits`: (our function, operation) of each wait outside of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, str]] = []
        self._in_step = False
        self._pinned: list[Tensor] = []
        self._under_way: list[tuple[Tensor, Tensor]] = []
        self._lists = ExitStack()

    def __enter__(self) -> "Card":
        self._lists.enter_context(_Lists(self))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.close()

    @contextmanager
    def step(self, *, strict: bool = True) -> Iterator[None]:
        """A part in which nothing may wait; with `strict` false, a pause of it."""
        before, self._in_step = self._in_step, strict
        try:
            yield
        finally:
            self._in_step = before

    def catch_up(self) -> None:
        """Finish the copies to pinned memory that are under way: what waiting for an event does."""
        for target, value in self._under_way:
            target.copy_(value)
        self._under_way.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_card: list[OnCard] = []
        elsewhere: list[Tensor] = []

        def look(tensor: Tensor) -> Tensor:
            if isinstance(tensor, OnCard):
                on_card.append(tensor)
                return tensor.inside
            elsewhere.append(tensor)
            return tensor

        inside = _each([args, list(kwargs.values())], look)
        asked = kwargs.get("device")
        here = asked == CARD if asked is not None else bool(on_card)  # where the result lies
        if func is _aten.copy_.default and on_card and elsewhere:
            return self._copy(*args[:2], non_blocking=bool(args[2]) if len(args) > 2 else False)
        if func is _aten._to_copy.default:
            if here != bool(on_card):
                self._wait(func)
        elif on_card and elsewhere and not _may_meet(func, args, elsewhere):
            raise MixesDevices(f"{func} got a CPU tensor of shape {[tuple(t.shape) for t in elsewhere]}")
        elif on_card and _reads_values(func, args):
            self._wait(func)
        named = dict(zip(kwargs, inside[1], strict=True))
        if asked is not None:
            named["device"] = torch.device("cpu")
        pinned = named.pop("pin_memory", False)
        found = func(*inside[0], **named)
        if pinned:
            self._pinned.append(found)
        if not here:
            return found
        known = {id(tensor.inside): tensor for tensor in on_card}  # what is changed in place stays what it is
        return _each(found, lambda value: known[id(value)] if id(value) in known else OnCard(value))

    def _copy(self, target: Tensor, value: Tensor, *, non_blocking: bool) -> Tensor:
        """Between host and card: to pinned memory of the host nobody waits, and the value comes later."""
        if non_blocking and any(target.data_ptr() == pinned.data_ptr() for pinned in self._pinned):
            target.copy_(~value.inside if value.dtype == torch.bool else value.inside + 1)  # whoever reads now is wrong
            self._under_way.append((target, value.inside.clone()))
            return target
        self._wait(_aten.copy_.default)
        inside = [part.inside if isinstance(part, OnCard) else part for part in (target, value)]
        inside[0].copy_(inside[1])
        return target

    def _wait(self, func: Any) -> None:
        if self._in_step:
            raise Waits(f"the host waits for the card: {func}, in {_caller()}")
        self.waits.append((_caller(), func.overloadpacket.__name__))


class _Lists(TorchFunctionMode):
    """Makes the card's tensors of Python's numbers, which are copied from memory that is not pinned."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            return func(*args, **kwargs)
        asked = kwargs.get("device", args[0].device if func is Tensor.new_tensor else None)
        if asked is None or torch.device(asked) != CARD or isinstance(args[-1], Tensor):
            return func(*args, **kwargs)
        self.card._wait(torch.ops.aten.lift_fresh.default)
        func = torch.tensor if func is Tensor.new_tensor else func
        return OnCard(func(*args[-1:], **kwargs | {"device": torch.device("cpu")}))


def value_of(tree: Any) -> Any:
    """The same lists and dicts with all tensors on the CPU, cut off from their graph."""
    return tree_map_only(Tensor, lambda t: (t.inside if isinstance(t, OnCard) else t).detach().clone(), tree)


def _each(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the tensors in what an operation takes or gives; pytree would take ten times as long."""
    if isinstance(values, Tensor):
        return change(values)
    return type(values)([_each(value, change) for value in values]) if type(values) in (list, tuple) else values


def _may_meet(func: Any, args: Any, elsewhere: list[Tensor]) -> bool:
    """Whether tensors of the CPU may be given to `func` beside the card's: as numbers, which a kernel takes."""
    by_element = torch.Tag.pointwise in func.tags or func is _aten.fill_.Tensor
    changes_them = func._schema.is_mutable and not isinstance(args[0], OnCard)
    return by_element and not changes_them and all(tensor.ndim == 0 for tensor in elsewhere)


def _reads_values(func: Any, args: Any) -> bool:
    """Whether `func` must know values of the card before it goes on: a number, or the size of its result."""
    if func in _BY_INDEX:
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        fills = func is not _aten.index.Tensor and args[2].numel() == 1  # `masked_fill`, whose size is known
        return bool(masks) and not fills
    return func is _aten._linalg_check_errors.default or any(tag in func.tags for tag in _SIZED_BY_VALUES)


def _caller() -> str:
    """The innermost function of the package on the stack, `module.function`."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname.split('.<')[0]}"
        frame = frame.f_back
    return "?"
