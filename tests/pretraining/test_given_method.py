"""A method that a Python caller gives: what it may return, what it is called with, and what run.json keeps of it."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maedistill
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError
from maedistill.methods.mae import MAE
from maedistill.pretraining.build import build_encoder, build_method
from maedistill.pretraining.given_method import require_losses
from maedistill.runs.history import RESERVED
from maedistill.runs.objects import Objects, arguments_of

LOSS = torch.ones((), requires_grad=True)


def config_of(method: str = "mae", **sections: Any) -> PretrainConfig:
    """A student of 8 x 8 patches of 4 pixels; with a method that has a teacher, its average."""
    given: dict[str, Any] = {
        "method": method,
        "data": {"image_size": 32},
        "student": {"model": "vit_tiny_patch16_224", "patch_size": 4, "width": 32, "depth": 2, "num_heads": 2},
        "decoder": {"width": 16, "depth": 1, "num_heads": 2},
    }
    if method != "mae":
        given |= {"teacher": {"source": "ema"}, "masks": {"teacher_keep_ratio": 1.0}}
    return PretrainConfig(**given | sections)


def built(config: PretrainConfig, method: Any = None) -> MAE:
    return build_method(config, build_encoder(config), None, Objects(method=method))


class Own(MAE):
    def __init__(self, encoder: Any, decoder: Any, *, pixels: Any, fault: str = "") -> None:
        super().__init__(encoder, decoder, pixels=pixels)
        if fault:
            raise KeyError(fault)


class NoTeacher(Own):
    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": images.mean()}


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (LOSS, "a Tensor"),
        (None, "a NoneType"),
        ({}, "nothing"),
        ({"pixels": LOSS}, "no `loss`, but 'pixels'"),
        ({"loss": 0.5}, "a float as 'loss'"),
        ({"loss": LOSS, "size": 0.5}, "a float as 'size'"),
        ({"loss": LOSS, "size": LOSS.expand(3)}, "shape [3] as 'size'"),
        ({"loss": LOSS, "size": torch.ones((), device="meta")}, "'size' on meta"),
        ({"loss": LOSS.detach()}, "`loss` without a gradient"),
        ({"loss": LOSS, 3: LOSS}, "named 3"),
        *(({"loss": LOSS, name: LOSS}, f"named {name!r}") for name in sorted(RESERVED)),
    ],
)
def test_what_is_no_loss_is_named_with_the_class(returned: Any, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        require_losses(returned, "page.Own")
    assert error.value.cause.startswith("method: page.Own returned ") and what in error.value.cause
    assert all(name in error.value.remedy for name in RESERVED)


def test_losses_are_scalars_with_any_other_name() -> None:
    require_losses({"loss": LOSS, "align/teacher2/0": LOSS.detach(), "count": torch.tensor(3)}, "page.Own")


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ("Own", "method: builtins.str cannot be called with encoder, decoder, pixels="),
        (partial(Own, wheight=1), "Own cannot be called with encoder, decoder, pixels="),
        (NoTeacher, "NoTeacher.forward cannot be called with images, split"),
        (lambda *_, **__: nn.Identity(), "gives a Identity, not a MAE"),
    ],
)
def test_a_method_with_other_arguments_is_named_before_it_is_called(given: Any, cause: str) -> None:
    with pytest.raises(ConfigError) as error:
        built(config_of(), given)
    assert cause in error.value.cause and "maedistill.methods.mae.MAE" in error.value.remedy


def test_a_method_without_a_teacher_s_arguments_is_named() -> None:
    config = config_of("amd", align={"student": (1,), "teacher": (1,)}, generate={"num_heads": 1})
    with pytest.raises(ConfigError, match="Own cannot be called with encoder, decoder, pixels=, align=, generate="):
        built(config, Own)


def test_what_a_method_raises_itself_is_left_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        built(config_of(), partial(Own, fault="mine"))


def test_plain_arguments_are_kept_as_written_and_others_by_class() -> None:
    values = {"weight": 0.1, "blocks": (1, [2]), "names": {"a": None}, "text": "s3://me:secret@host", "layer": nn.GELU}
    assert arguments_of(partial(Own, 7, **values, made=nn.GELU())) == {
        "0": "7",
        "weight": "0.1",
        "blocks": "(1, [2])",
        "names": "{'a': None}",
        "text": "'s3://***@host'",
        "layer": "torch.nn.modules.activation.GELU",
        "made": "torch.nn.modules.activation.GELU",
    }
    assert arguments_of(Own) == {} == arguments_of(None)


def test_weights_that_are_all_0_are_refused_unless_the_method_has_losses_of_its_own() -> None:
    zero = {"pixels": {"weight": 0.0}}
    with pytest.raises(ConfigError, match=r"^pixels\.weight"):
        built(config_of(**zero))
    assert isinstance(built(config_of(**zero), Own), Own)
    align = {"student": (1,), "teacher": (1,), "weight": 0.0}
    with pytest.raises(ConfigError) as error:
        built(config_of("amd", **zero, align=align, generate={"num_heads": 1, "weight": 0.0}))
    assert all(f"{name}.weight" in error.value.remedy for name in ("pixels", "align", "generate"))
    assert isinstance(built(config_of("amd", **zero, align=align, generate={"num_heads": 1})), maedistill.AMD)
