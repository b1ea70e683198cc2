"""torch.compile: when a run uses it, and with which options.

Compiled and eager runs agree up to rounding, so `engine.compile` may change between two starts of a run. The
options keep the random draws inside the networks (drop path) equal to eager mode; by default, inductor draws other
numbers from the same seed.
"""

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from maedistill.errors import ConfigError
from maedistill.escaping import say
from maedistill.processes.distributed import local_rank

P = ParamSpec("P")
R = TypeVar("R")


def should_compile(setting: bool | None, device: torch.device, *, zero: int) -> bool:
    """Resolve `engine.compile`. None means: on a GPU, below ZeRO 3, if a compiler works on this machine.

    Raises ConfigError if the setting is true and no compiler works.
    """
    if not (setting if setting is not None else device.type == "cuda" and zero < 3):
        return False
    failure = _compiler_failure(device)
    if failure is None:
        return True
    if setting:
        raise ConfigError(
            f"engine.compile: torch.compile fails on this machine ({failure})",
            "install a compiler (gcc, on a CPU g++) and Python's headers, which are often missing, or set "
            "engine.compile=false",
        )
    if local_rank() == 0:
        say(
            f"runs without torch.compile, which fails on this machine ({failure}); a C compiler or Python's headers "
            "are often missing",
            error=True,
        )
    return False


def compile_module(module: nn.Module) -> None:
    """Compile the forward pass of `module` in place; its parameter names do not change."""
    module.compile(options=_options())


def compile_function(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` compiled."""
    return torch.compile(function, options=_options())


def _options() -> dict[str, str | int | bool | Callable[..., object]]:
    """Return inductor's options; in deterministic mode no kernel or padding is chosen by a timing."""
    deterministic = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
    return {"fallback_random": True, **deterministic}


@cache
def _compiler_failure(device: torch.device) -> str | None:
    """Compile and run one small kernel; return why it fails, or None. Triton needs a C compiler and Python headers."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # returned; the caller reports it
        reason = next(iter(str(error).strip().splitlines()), "no message")
        return f"{type(error).__name__}: {reason}"
    return None
