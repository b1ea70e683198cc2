"""AdamW, its weight decay groups and its learning rate: timm's groups and cosine schedule, torch's fused AdamW.

    module -> parameter_groups -> build_optimizer -> build_schedule; `schedule.step_update(step)` before update `step`

The rate is a pure function of the step: with W warm-up steps, T total steps, peak p and minimum m,

    step <  W   p * step / W
    step >= W   m + (p - m) / 2 * (1 + cos(pi * (step - W) / (T - W)))

times the group's `lr_scale` if it has one (layer decay). torch's AdamW alone would ignore `lr_scale`.
"""

from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import AdamW, Optimizer

from maedistill.errors import ConfigError
from maedistill.models.patches import learns_rope
from maedistill.models.vits import PlainViT

_NO_DECAY = ("cls_token", "reg_token", "mask_token", "pos_embed", "freqs")  # last components of parameter names


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: without weight decay (norms, biases, other 1-D, tokens, positions) and with it."""
    return param_groups_weight_decay(module, weight_decay, no_weight_decay_list=_undecayed(module))


def network_groups(network: nn.Module, weight_decay: float, *, layer_decay: float) -> list[dict[str, Any]]:
    """Return the groups of a classifier, each with its `lr_scale`: two per layer, with and without weight decay.

    The rate falls from the head to the patches. In a ViT with L blocks, `lr_scale` is layer_decay^0 for the head and
    the norm before it, layer_decay^(L + 1 - i) for layer i. Layer 0 is patch embedding, tokens and positions; layer i
    is block i - 1 (Bao et al., BEiT; MAE uses the same).
    Raises ConfigError for a layer decay of a network whose layers are not known.
    """
    if layer_decay == 1 and not isinstance(network, PlainViT):
        return [{"lr_scale": 1.0} | group for group in parameter_groups(network, weight_decay)]
    if not hasattr(network, "group_matcher"):  # of timm: it says which parameters make up a layer
        raise ConfigError(
            f"optim.layer_decay: the layers of a {type(network).__name__} are not known",
            "set optim.layer_decay=1, or give the student timm's method group_matcher",
        )
    undecayed = _undecayed(network)
    groups = param_groups_layer_decay(network, weight_decay, no_weight_decay_list=undecayed, layer_decay=layer_decay)
    if isinstance(network, PlainViT):
        vit: Any = network
        # timm assigns `norm`, which precedes a head that reads the class token, to the last block.
        _move(groups, [*vit.norm.parameters()], beside=vit.head.bias)
        if learns_rope(vit):  # whose frequencies timm assigns to the head
            _move(groups, [*vit.rope.parameters()], beside=vit.patch_embed.proj.bias)
    return groups


def _undecayed(module: nn.Module) -> list[str]:
    """Return the names of tokens and positions; timm leaves norms, biases and other 1-D parameters out by itself."""
    return [name for name, _ in module.named_parameters() if name.rpartition(".")[2] in _NO_DECAY]


def _move(groups: list[dict[str, Any]], parameters: list[nn.Parameter], *, beside: nn.Parameter) -> None:
    """Move parameters to the group that has `beside`."""
    moved = {id(parameter) for parameter in parameters}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    next(group for group in groups if any(one is beside for one in group["params"]))["params"] += parameters


def layer_rates(groups: list[dict[str, Any]], peak: float) -> list[float]:
    """Return the peak learning rate of each layer of `network_groups`, from the patch embedding to the head."""
    return sorted({peak * group["lr_scale"] for group in groups})


def build_optimizer(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> AdamW:
    """Build fused AdamW, on the CPU too: one kernel per update, which can skip the update without a host sync."""
    return AdamW(groups, lr=lr, betas=betas, fused=True)


def build_schedule(optimizer: Optimizer, *, min_lr: float, warmup_steps: int, total_steps: int) -> CosineLRScheduler:
    """Build a linear warm-up from 0 to the optimizer's `lr`, then half a cosine to `min_lr`."""
    assert 0 <= warmup_steps < total_steps
    return CosineLRScheduler(
        optimizer,
        t_initial=total_steps - warmup_steps,  # with warmup_prefix the cosine starts after the warm-up
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
