"""Shared by the tests on the pretend card: the real engine on it, with a stand-in for DeepSpeed's stage 0.

Networks that are described alike are built once for all tests of this folder: most of the time went there.
"""

import copy
import functools
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from maedistill.finetuning import build as build_finetuning
from maedistill.models.vits import build_vit
from maedistill.pretraining import build as build_pretraining
from maedistill.processes import distributed
from maedistill.training import engine
from maedistill.weights import from_file
from tests.device.pretend_card import CARD, OnCard

_built = functools.cache(build_vit)


def _copy_of_built(model: str, **shape: object) -> VisionTransformer:
    with _disable_current_modes():  # the card looks at every operation, and there are a hundred thousand
        return copy.deepcopy(_built(model, **shape))


@pytest.fixture(autouse=True)
def _networks_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (build_pretraining, build_finetuning, from_file):
        monkeypatch.setattr(module, "build_vit", _copy_of_built)


class Stage0(nn.Module):
    """What DeepSpeed does at stage 0 with one rank."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.optimizer, self.micro = model, optimizer, 0
        self.accumulation = config["gradient_accumulation_steps"]

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        return self.model(*inputs)

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.micro + 1) % self.accumulation == 0

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.micro += 1


@pytest.fixture
def engine_on_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Engine` works on the card, with the list operations that torch uses on a GPU."""
    stand_in, tools = ModuleType("deepspeed"), ModuleType("deepspeed.utils")
    stand_in.initialize = lambda **given: (Stage0(**given), None)
    stand_in.zero = SimpleNamespace(GatheredParameters=lambda *_, **__: nullcontext())
    for name in ("get_full_fp32_param", "get_full_optimizer_state", "set_full_optimizer_state"):
        setattr(tools, f"safe_{name}", None)  # of the other stages
    tools.safe_set_local_optimizer_state = None
    monkeypatch.setitem(sys.modules, "deepspeed", stand_in)
    monkeypatch.setitem(sys.modules, "deepspeed.utils", tools)
    for module in (distributed, engine):
        monkeypatch.setattr(module, "device", lambda: CARD)
    monkeypatch.setattr(torch.backends.cuda, "enable_flash_sdp", lambda _: None)  # the engine would for good
    monkeypatch.setattr("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", lambda: ["cpu"])
    monkeypatch.setattr("torch.utils._foreach_utils._foreach_supported_types", [Tensor, nn.Parameter, OnCard])
