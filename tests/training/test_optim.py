"""Weight decay by name and shape, and the schedule against its closed form at every step."""

import math

import pytest
import torch
from timm.layers import PatchEmbed
from torch import nn

from maedistill.training.optim import build_optimizer, build_schedule, parameter_groups


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
    spared = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert decayed == {"encoder.patch_embed.proj.weight", "token_mixer.weight"}
    assert decayed | spared == set(names.values())
    assert not decayed & spared


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (3, 4), (5, 37)])
def test_schedule_is_its_closed_form_at_every_step(warmup, total):
    peak, low = 1.5e-3, 1e-6
    parameters = [nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    groups = [{"params": [parameters[0]], "lr_scale": 0.65}, {"params": [parameters[1]]}]
    optimizer = build_optimizer(groups, lr=123.0, betas=(0.9, 0.95))
    schedule = build_schedule(optimizer, peak=peak, min_lr=low, warmup_steps=warmup, total_steps=total)
    for step in reversed(range(total + 2)):  # a pure function of the step: no order, and not past the end
        schedule.step_update(step)
        progress = min(1.0, (step - warmup) / (total - warmup))
        expected = (
            peak * step / warmup if step < warmup else low + (peak - low) / 2 * (1 + math.cos(math.pi * progress))
        )
        scaled, plain = (group["lr"] for group in optimizer.param_groups)
        assert plain == pytest.approx(expected, rel=0, abs=1e-12 * peak)
        assert scaled == pytest.approx(0.65 * expected, rel=0, abs=1e-12 * peak)
