"""Online and self-distillation against reference numbers, gradients included, and what the losses must not notice."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from maedistill.losses.features import feature_loss, mean_of_blocks
from maedistill.losses.logits import kd_loss
from maedistill.losses.self_distillation import (
    codistillation_loss,
    energy_map,
    mutual_loss,
    past_target,
    self_attention_loss,
)
from tests.support.golden import GOLDEN


def others(tensors, i):
    return [tensor for j, tensor in enumerate(tensors) if j != i]


def exits(logits, target):
    """The loss of each exit but the deepest, as in `finetuning.self_terms.Exits`: 0.7 CE + 0.3 KD at T = 3."""
    deepest = logits[-1]
    soft = [kd_loss(z, deepest, temperature=3.0) for z in logits[:-1]]
    hard = [F.cross_entropy(z, target) for z in logits[:-1]]
    return F.cross_entropy(deepest, target) + 0.7 * sum(hard) + 0.3 * sum(soft)


def exit_features(features):
    losses = [feature_loss(f, features[-1], distance="mse", normalize="whiten") for f in features[:-1]]
    return torch.stack(losses).mean()


def cosine_smooth_l1(student, given):
    teacher = (given["teacher_tokens"] - given["stored_mean"]) / given["stored_std"]
    return feature_loss(student, teacher, distance="cosine_smooth_l1", normalize="none")


def past(logits, given):
    one_hot = F.one_hot(given["target"], 10).float()
    target = past_target(one_hot, given["past_probabilities"], alpha=0.8 * 4 / 10)
    return F.cross_entropy(logits, target)


# reference: (the input, how many of its leading entries get a gradient, the loss); 0: its first entry is the input
CASES = {
    "exits_a0.3_T3": ("exit_logits", 4, lambda x, given: exits(x, given["target"])),
    "exits_feature": ("exit_features", 3, lambda x, given: exit_features(x)),
    "self_attention": ("block_tokens", 2, lambda x, given: self_attention_loss(list(x))),
    "cosine0.9_smooth_l1_0.1": ("student_tokens", 3, lambda x, given: cosine_smooth_l1(x, given)),
    "past_epoch3_of_10_a0.8": ("peer_logits", 0, lambda x, given: past(x, given)),
}


@pytest.fixture
def given():
    with np.load(GOLDEN / "online.npz") as arrays:
        return {key: torch.from_numpy(value) for key, value in arrays.items()}


def close(ours, theirs):
    assert ours.shape == theirs.shape
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"off by {error:.1e} of the largest value")
    assert error <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_golden_online(given, name):
    inputs, count, loss = CASES[name]
    x = given[inputs][0] if count == 0 else given[inputs]
    value = loss(x.requires_grad_(), given)
    (gradient,) = torch.autograd.grad(value, x)
    close(value.detach(), given[f"{name}_loss"])
    close(gradient[:count] if count else gradient, given[f"{name}_grad"])
    assert count in (0, len(x)) or not gradient[count:].any(), "the side that teaches gets no gradient"


@pytest.mark.parametrize(("name", "loss"), [("mutual", mutual_loss), ("codistill", codistillation_loss)])
def test_golden_online_peers(given, name, loss):
    peers = [logits.clone().requires_grad_() for logits in given["peer_logits"]]
    for i, own in enumerate(peers):
        value = F.cross_entropy(own, given["target"]) + loss(own, others(peers, i))
        gradients = torch.autograd.grad(value, peers, allow_unused=True)
        close(value.detach(), given[f"{name}_loss"][i])
        close(gradients[i], given[f"{name}_grad"][i])
        assert all(gradient is None for gradient in others(gradients, i)), "peers are detached"


def test_golden_mean_of_blocks(given):
    close(mean_of_blocks(list(given["late_blocks"])), given["ema_target"])


def test_equal_peers_add_nothing_and_two_peers_make_both_losses_one(given):
    own, other, _ = given["peer_logits"]
    for loss in (mutual_loss, codistillation_loss):
        x = own.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x, [own, own]), x)
        assert gradient.abs().max() < 1e-7
    assert mutual_loss(own, [other]) == pytest.approx(float(codistillation_loss(own, [other])), rel=1e-6)


def test_an_energy_map_has_a_scale_of_its_own_and_does_not_care_for_order():
    tokens = torch.randn(2, 9, 384, generator=torch.Generator().manual_seed(0))
    maps, order = energy_map(tokens), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(energy_map(30 * tokens), maps, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(energy_map(tokens[:, order]), maps[:, order])
    assert 0.01 < float(maps.max()) < 0.9, "a softmax of raw sums of squares would be one-hot"
    loss = self_attention_loss([tokens, tokens.flip(1)])
    torch.testing.assert_close(self_attention_loss([tokens[:, order], tokens.flip(1)[:, order]]), loss)


def test_no_past_is_the_target_itself_bit_for_bit(given):
    one_hot = F.one_hot(given["target"], 10).float()
    assert torch.equal(past_target(one_hot, given["past_probabilities"], alpha=0.0), one_hot)
