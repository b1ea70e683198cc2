"""Weight decay by name and shape, rates by layer, and the schedule against its closed form at every step."""

import math

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from torch import nn

from maedistill.models.vits import build_vit
from maedistill.training.optim import (
    build_optimizer,
    build_schedule,
    layer_rates,
    network_groups,
    parameter_groups,
)


class Vit(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = PatchEmbed(8, 4, 3, 6)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 6))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 6))
        self.reg_token = nn.Parameter(torch.zeros(1, 2, 6))
        self.norm = nn.LayerNorm(6)


class Method(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Vit()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 6))
        self.token_mixer = nn.Linear(6, 6)  # a name that only resembles a token's


def test_only_matrices_decay():
    method = Method()
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    groups = parameter_groups(method, 0.05)
    decayed = {names[id(p)] for group in groups if group["weight_decay"] == 0.05 for p in group["params"]}
    undecayed = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert decayed == {"encoder.patch_embed.proj.weight", "token_mixer.weight"}
    assert decayed | undecayed == set(names.values())
    assert not decayed & undecayed


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (3, 4), (5, 37)])
def test_schedule_is_its_closed_form_at_every_step(warmup, total):
    peak, low = 1.5e-3, 1e-6
    parameters = [nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    groups = [{"params": [parameters[0]], "lr_scale": 0.65}, {"params": [parameters[1]]}]
    optimizer = build_optimizer(groups, lr=peak, betas=(0.9, 0.95))
    schedule = build_schedule(optimizer, min_lr=low, warmup_steps=warmup, total_steps=total)
    for step in reversed(range(total + 2)):  # a pure function of the step: no order, and not past the end
        schedule.step_update(step)
        progress = min(1.0, (step - warmup) / (total - warmup))
        expected = (
            peak * step / warmup if step < warmup else low + (peak - low) / 2 * (1 + math.cos(math.pi * progress))
        )
        scaled, plain = (group["lr"] for group in optimizer.param_groups)
        assert plain == pytest.approx(expected, rel=0, abs=1e-12 * peak)
        assert scaled == pytest.approx(0.65 * expected, rel=0, abs=1e-12 * peak)


def papers_layer(name, depth):
    """BEiT's and MAE's layer of a ViT's parameter: 0 to depth + 1."""
    if name in ("cls_token", "reg_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    assert name.split(".")[0] in ("norm", "fc_norm", "head"), name
    return depth + 1


def vit_base(**arguments):
    with torch.device("meta"):  # names and shapes are all that is asked for
        return timm.create_model("vit_base_patch16_224", **arguments)


NETWORKS = {
    "ViT-B, as MAE fine-tunes it": {"global_pool": "avg"},
    "class token": {"global_pool": "token"},
    "registers": {"global_pool": "avg", "reg_tokens": 4, "class_token": False},
    "no decay by layer": {"global_pool": "token"},
}


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_has_the_papers_rate_and_decay_at_every_step(network):
    vit, depth, peak, low, warmup, total = vit_base(**NETWORKS[network]), 12, 2e-3, 1e-6, 5, 40
    layer_decay = 1.0 if network == "no decay by layer" else 0.65
    groups = network_groups(vit, 0.05, layer_decay=layer_decay)
    optimizer = build_optimizer(groups, lr=peak, betas=(0.9, 0.999))
    schedule = build_schedule(optimizer, min_lr=low, warmup_steps=warmup, total_steps=total)
    in_groups = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    assert sorted(in_groups) == sorted(names), "each parameter in one group"
    assert sum(papers_layer(name, depth) == depth + 1 for name in names.values()) == 4
    for step in (0, 1, 4, warmup, 17, total - 1, total):
        schedule.step_update(step)
        cosine = low + (peak - low) / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        rate = peak * step / warmup if step < warmup else cosine
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                scale = layer_decay ** (depth + 1 - papers_layer(name, depth))
                assert group["lr_scale"] == pytest.approx(scale, rel=0, abs=1e-12), name
                assert group["lr"] == pytest.approx(scale * rate, rel=1e-12, abs=1e-12 * peak), (name, step)
                matrix = parameter.ndim > 1 and name not in ("cls_token", "reg_token", "pos_embed")
                assert group["weight_decay"] == (0.05 if matrix else 0), name


def test_rotary_frequencies_that_are_learned_are_positions():
    vit = build_vit("vit_small_patch16_rope_mixed_224", image_size=224, depth=2, num_classes=3, global_pool="token")
    [name] = [name for name, _ in vit.named_parameters() if "freqs" in name]
    for groups in (network_groups(vit, 0.05, layer_decay=0.5), parameter_groups(vit, 0.05)):
        [group] = [g for g in groups if any(one is vit.get_parameter(name) for one in g["params"])]
        assert (group["weight_decay"], group.get("lr_scale", 0.125)) == (0, 0.125)


def test_other_networks_tokens_do_not_decay_by_layer_either():
    beit = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=12, num_heads=2, num_classes=3)
    for layer_decay in (1.0, 0.5):
        groups = network_groups(beit, 0.05, layer_decay=layer_decay)
        [group] = [g for g in groups if any(one is beit.cls_token for one in g["params"])]
        assert group["weight_decay"] == 0


def test_the_rates_that_are_printed_are_one_for_each_layer():
    for global_pool in ("avg", "token"):
        vit = vit_base(global_pool=global_pool)
        expected = [2e-3 * 0.65 ** (13 - layer) for layer in range(14)]
        assert layer_rates(network_groups(vit, 0.05, layer_decay=0.65), 2e-3) == pytest.approx(expected, rel=1e-12)
        assert layer_rates(network_groups(vit, 0.05, layer_decay=1.0), 2e-3) == [2e-3]
