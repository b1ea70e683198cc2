"""Terms without a teacher: exits that learn from the network's own end, and blocks that follow deeper ones."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from maedistill.errors import ConfigError
from maedistill.finetuning.objective import Supervised
from maedistill.finetuning.outputs import RequestedOutputs, forward_outputs
from maedistill.finetuning.self_terms import exit_networks
from maedistill.losses.self_distillation import self_attention_loss
from tests.finetuning.test_distilled import IMAGES, TARGETS, assemble, teacher_of, vit
from tests.finetuning.test_distilled import load as load_distilled

EXITS = ["student.exits=[0,1]", "distill.exits={weight: 2, alpha: 0.4, temperature: 2, feature_weight: 0.3}"]
load = partial(load_distilled, taught=False)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_exits_add_up_and_are_what_the_network_that_ends_there_gives(tmp_path, pool):
    student = vit(seed=1, global_pool=pool).eval()
    module, teaching = assemble(load(tmp_path, *EXITS), student)
    losses = module(IMAGES, TARGETS, *teaching(IMAGES, 0))
    losses["loss"].backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.count_nonzero()] == []
    logits, expected = student(IMAGES), losses["cross_entropy"].detach()
    for name, network in exit_networks(module).items():
        block, own = int(name.removeprefix("exit").removesuffix("_")), network(IMAGES)
        assert len(network.blocks) == block + 1 and len(student.blocks) == 3
        hard = F.cross_entropy(own, TARGETS)
        soft = 4 * F.kl_div((own / 2).log_softmax(1), (logits / 2).softmax(1), reduction="batchmean")
        ends = (net.forward_head(net.forward_features(IMAGES), pre_logits=True) for net in (network, student))
        pooled, deepest = ends
        far = F.mse_loss(pooled, F.layer_norm(deepest, deepest.shape[-1:]))
        for part, value in (("cross_entropy", hard), ("divergence", soft), ("features", far)):
            torch.testing.assert_close(losses[f"exits/{block}/{part}"], value, rtol=1e-4, atol=1e-6)
        expected = expected + 2 * (0.6 * hard + 0.4 * soft + 0.3 / 2 * far)
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-4, atol=1e-6)


def test_heads_alone_leave_the_trunk_its_gradients_bit_for_bit(tmp_path):
    alone = "distill.exits={weight: 1, alpha: 0, feature_weight: 0, trunk_gradients: false}"
    student, plain = vit(seed=1), vit(seed=1)
    module, teaching = assemble(load(tmp_path, "student.exits=[0,1]", alone), student)
    for network, losses in (
        (student, module(IMAGES, TARGETS, *teaching(IMAGES, 0))),
        (plain, Supervised(plain)(IMAGES, TARGETS)),
    ):
        losses["loss"].backward()
        assert all(p.grad is not None for p in network.parameters())
        if network is student:  # what has no weight is not computed: if it were not finite, the sum would not be
            parts = {name for name in losses if name.startswith("exits/")}
            assert parts == {"exits/0/cross_entropy", "exits/1/cross_entropy"}
    pairs = zip(student.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs)
    assert all(p.grad.count_nonzero() for p in module.terms["exits"].heads["1"].head.parameters())


def test_self_attention_moves_all_but_the_deepest_block(tmp_path):
    setting = "distill.self_attention={weight: 0.5, blocks: [0,1,2], start_epoch: 1}"
    student = vit(seed=1).eval()
    module, teaching = assemble(load(tmp_path, setting), student)
    blocks = forward_outputs(student, IMAGES, RequestedOutputs(blocks=(0, 1, 2)))
    expected = self_attention_loss([blocks[f"tokens/{i}"][:, 1:] for i in range(3)])
    for step, weight in ((0, 0.0), (10, 0.5)):
        losses = module(IMAGES, TARGETS, *teaching(IMAGES, step))
        torch.testing.assert_close(losses["self_attention"], expected)
        torch.testing.assert_close(losses["loss"], losses["cross_entropy"] + weight * expected)
        assert float(losses["weight/self_attention"]) == weight
    (gradient,) = torch.autograd.grad(losses["self_attention"], student.blocks[1].mlp.fc2.weight, retain_graph=True)
    assert gradient.count_nonzero()
    deepest = torch.autograd.grad(losses["self_attention"], student.blocks[2].mlp.fc2.weight, allow_unused=True)[0]
    assert deepest is None or not deepest.count_nonzero()


def test_terms_with_and_without_a_teacher_go_together(tmp_path):
    """A step in which the teacher rests still trains the exits."""
    later = ['distill.teachers=["run:x"]', "distill.hints={weight: 1, student: [1], teacher: [1], start_epoch: 5}"]
    module, teaching = assemble(load(tmp_path, *EXITS, *later), vit(seed=1), teacher_of(vit(seed=2)))
    for step, names in ((0, {"exits"}), (50, {"exits", "hints"})):
        losses = module(IMAGES, TARGETS, *teaching(IMAGES, step))
        assert {name.partition("/")[0] for name in losses} & {"exits", "hints"} == names


def test_exits_of_a_network_that_has_no_such_blocks_are_refused(tmp_path):
    """The config may not know the depth: that of a run."""
    config = load(tmp_path, "init.source=run:x", "student.exits=[2]", "distill.exits={weight: 1}")
    with pytest.raises(ConfigError, match=r"student\.exits"):
        assemble(config, vit(seed=1))
    with pytest.raises(ConfigError, match=r"distill\.exits: .* not a VisionTransformer"):
        assemble(config, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 5)))
