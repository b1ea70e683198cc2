"""A method that a Python caller passes: what it must take, and what it must return."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from maedistill.errors import ConfigError, join_first
from maedistill.methods.mae import MAE
from maedistill.models.decoder import TokenDecoder
from maedistill.models.encoder import Encoder
from maedistill.runs.history import RESERVED
from maedistill.runs.objects import class_name


def build_given(
    make: Callable[..., nn.Module],
    expected: type[MAE],
    networks: tuple[Encoder, TokenDecoder | None],
    specs: Mapping[str, Any],
    *,
    targets: int,
) -> MAE:
    """Return the method that `make` gives in place of an `expected`, whose arguments it takes.

    targets: how many teachers its `forward` will get the outputs of. Raises ConfigError unless it takes them.
    """
    name, base = class_name(make), class_name(expected)
    partial = f"let it take the arguments of {base}, and give it others by functools.partial"
    _require_call(make, name, ("encoder", "decoder"), specs, remedy=partial)
    method = make(*networks, **specs)
    if not isinstance(method, expected):
        raise ConfigError(
            f"method: {name} gives a {type(method).__name__}, not a {expected.__name__}",
            f"derive it from {base}, or name its base in the config's method",
        )
    inputs = ("images", "split", *(["target"] * targets))
    _require_call(method.forward, f"{name}.forward", inputs, remedy=f"let it take the arguments of {base}.forward")
    return method


def _require_call(
    function: Any, name: str, places: Sequence[str], keywords: Iterable[str] = (), *, remedy: str
) -> None:
    """Raise ConfigError unless `function` can be called with these arguments."""
    try:
        inspect.signature(function).bind(*places, **dict.fromkeys(keywords))
    except (TypeError, ValueError) as error:
        given = ", ".join([*places, *(f"{keyword}=" for keyword in keywords)])
        raise ConfigError(f"method: {name} cannot be called with {given} ({error})", remedy) from error


def require_losses(returned: Any, name: str) -> None:
    """Raise ConfigError unless a method returned scalars by name, among them a `loss` with a gradient.

    name: of its class. Nothing here waits for the device.
    """
    if problem := _problem(returned):
        raise ConfigError(
            f"method: {name} returned {problem}",
            "return a dict of scalar tensors on the device of the images, of which `loss` has a gradient; its other "
            f"names are free, except for {', '.join(sorted(RESERVED))}",
        )


def _problem(returned: Any) -> str:
    """Say what is wrong with what a method returned; empty for losses."""
    if not isinstance(returned, dict):
        return f"a {type(returned).__name__}, not losses by name"
    if "loss" not in returned:
        return f"no `loss`, but {join_first(map(repr, returned)) or 'nothing'}"
    for name, value in returned.items():
        if not isinstance(name, str) or name in RESERVED:
            return f"a term named {name!r}, " + ("which records use themselves" if name in RESERVED else "not a text")
        if not isinstance(value, Tensor):
            return f"a {type(value).__name__} as {name!r}"
        if value.ndim:
            return f"a tensor of shape {list(value.shape)} as {name!r}"
        if value.device != returned["loss"].device:
            return f"{name!r} on {value.device}, `loss` on {returned['loss'].device}"
    return "" if returned["loss"].requires_grad else "a `loss` without a gradient"
