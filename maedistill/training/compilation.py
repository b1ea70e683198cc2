"""torch.compile: when a run uses it, with which options, and where its results are kept.

Compiled and eager runs agree up to rounding, so `engine.compile` may change between two starts of a run. Random draws
inside the networks (drop path) stay those of eager mode: by default, inductor draws other numbers from the same seed.
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T", bound=Callable[..., Any])

_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"fallback_random": True}


def keep_compiled() -> None:
    """Let torch.compile keep its results in the user's cache, where that can be written to: a warm second start.

    torch's own place is the machine's folder for temporary files, which a reboot or a new container empties.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.access(cache, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(cache, "maedistill", "compiled"))


def should_compile(setting: bool | None, device: torch.device, *, zero: int) -> bool:
    """Resolve `engine.compile`. None: on a GPU, below ZeRO 3, if a compiler works on this machine."""
    if setting is not None:
        return setting
    return device.type == "cuda" and zero < 3 and _compiler_works(device)


def compile_module(module: nn.Module) -> None:
    """Compile the forward pass of `module` in place; its parameter names stay."""
    module.compile(options=_OPTIONS)


def compile_function(function: T) -> T:
    """Return `function` compiled."""
    return torch.compile(function, options=_OPTIONS)


@cache
def _compiler_works(device: torch.device) -> bool:
    """Compile and run one small kernel. Triton needs a C compiler and Python's headers, which some images lack."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # said below; eager mode gives the same result, more slowly
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        print(
            f"runs without torch.compile, which fails on this machine ({type(error).__name__}: {reason}); "
            "a C compiler and Python's headers are what it usually lacks",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True
