"""The past as teacher: the loss by hand, plain cross-entropy without a past, and a kill that loses nothing."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from maedistill.config.distill import PastConfig
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.plan import BatchPlan, Plan
from maedistill.data.images.augment import seed_generators
from maedistill.exporting.card import model_card
from maedistill.finetuning.build import build_labelled_crops
from maedistill.finetuning.loop import train
from maedistill.finetuning.objective import Supervised
from maedistill.finetuning.past import Past
from maedistill.finetuning.predictions import Predictions
from maedistill.finetuning.setup import Finetuning, open_finetuning
from maedistill.weights.from_run import open_run
from tests.conftest import SCRATCH
from tests.faults.notes import same_result

PAST = [*SCRATCH, "optim.epochs=2", "distill.label_weight=0", "distill.past.weight=1"]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGETS = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)).softmax(dim=1)


@pytest.fixture
def opened(finetuning):
    """Opens the parts of a run: 8 steps an epoch, 5 epochs."""

    def open_parts(*settings: str) -> Finetuning:
        given = [*PAST, "optim.epochs=5", *settings]
        config = load_config(finetuning.config, given, root=FinetuneConfig, to_run=False).config
        return open_finetuning(config, world_size=1, device=torch.device("cpu"))

    return open_parts


def losses(parts: Finetuning, step: int) -> dict[str, torch.Tensor]:
    """The losses of a step, drop path off."""
    with torch.no_grad():
        return with_graph(parts, step)


def with_graph(parts: Finetuning, step: int) -> dict[str, torch.Tensor]:
    """The same, for a backward pass."""
    return parts.module.eval()(IMAGES, TARGETS, *parts.teacher_outputs(IMAGES, step))


def changed(parts: Finetuning, *, by: float) -> torch.nn.Module:
    """The network after some training; a copy of what it was before."""
    before = deepcopy(parts.module.vit)
    with torch.no_grad():
        for parameter in parts.module.vit.parameters():
            parameter += by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return before.eval()


def mixed(network: torch.nn.Module, past: torch.nn.Module, share: float) -> float:
    """Cross-entropy with mixed targets, image by image and class by class."""
    with torch.no_grad():
        logs, earlier = network(IMAGES).log_softmax(dim=1).tolist(), past(IMAGES).softmax(dim=1).tolist()
    targets = [
        [(1 - share) * y + share * p for y, p in zip(*rows, strict=True)]
        for rows in zip(TARGETS.tolist(), earlier, strict=True)
    ]
    return -sum(t * log for rows in zip(targets, logs, strict=True) for t, log in zip(*rows, strict=True)) / len(IMAGES)


def test_the_weights_of_the_epochs_begin_teach_all_of_it(opened):
    parts = opened("distill.past.alpha=0.5")
    for epoch in (1, 2):
        changed(parts, by=0.1)
        at_begin = deepcopy(parts.module.vit).eval()
        for step in (8 * epoch, 8 * epoch + 3, 8 * epoch + 7):
            found, expected = losses(parts, step), mixed(parts.module.vit, at_begin, 0.5 * (epoch + 1) / 5)
            assert float(found["loss"]) == float(found["past"]) == pytest.approx(expected, rel=1e-5)
            changed(parts, by=0.1)
    assert not parts.past.network.training and not any(p.requires_grad for p in parts.past.parameters())


def test_all_micro_batches_of_a_step_have_the_same_past():
    """Though a forward pass in between changes running statistics."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 3))
    plan = Plan(BatchPlan(4, accumulation=2), 1, 16, 6, 0)  # two steps an epoch
    past = Past(PastConfig(weight=1.0, source="weights"), network, plan=plan, epochs=3, precision="fp32")
    images, found = IMAGES[:, :, :2, :2], []
    for _ in range(2):
        found.append(past.outputs(images, 2, batch=None, now=network)["past"])
        network.train()(3 + images)
    assert torch.equal(*found)


def test_the_average_teaches_from_the_first_step(opened):
    parts = opened("distill.past.source=ema")
    before = changed(parts, by=0.3)
    assert float(losses(parts, 3)["loss"]) == pytest.approx(mixed(parts.module.vit, before, 0.8 / 5), rel=1e-5)
    assert float(losses(parts, 39)["loss"]) == pytest.approx(mixed(parts.module.vit, before, 0.8), rel=1e-5)


def test_without_a_past_it_is_plain_cross_entropy_bit_for_bit(opened):
    """In the first epoch, and while the term rests: gradients too."""
    parts = opened()
    plain = Supervised(deepcopy(parts.module.vit)).eval()
    changed(parts, by=0.3)
    changed(SimpleNamespace(module=plain), by=0.3)
    assert [len(parts.teacher_outputs(IMAGES, step)) for step in (7, 9)] == [2, 3]  # a past only then
    found, expected = with_graph(parts, 7), plain(IMAGES, TARGETS)
    for one in (found, expected):
        one["loss"].backward()
    assert torch.equal(found["loss"], expected["loss"])
    pairs = zip(parts.module.vit.parameters(), plain.vit.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs)
    resting = opened("distill.label_weight=1", "distill.past.start_epoch=3")
    assert [len(resting.teacher_outputs(IMAGES, step)) for step in (23, 24)] == [2, 3]
    assert torch.equal(losses(resting, 23)["loss"], losses(resting, 23)["cross_entropy"])


def learn(parts: Finetuning, folder) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The losses of 11 steps, of which 3 are in the second epoch, and the weights then; everything random is on."""
    config, found = parts.config, []
    crops = build_labelled_crops(config, parts.index, parts.samples, mean=parts.mean)
    optimizer = torch.optim.AdamW(parts.module.train().parameters(), 3e-3)
    if isinstance(parts.past, Predictions):
        there = SimpleNamespace(path=folder, checkpoints=folder)
        parts.past.begin(SimpleNamespace(folder=there, step=0, before_save=[]), crops.order)
    for step in range(11):
        batch = crops.__getitems__(list(range(12 * step, 12 * step + 12)))
        seed_generators(config.seed, step)
        images, targets = parts.inputs(batch)
        losses = parts.module(images, targets, *parts.teacher_outputs(images, step, batch))
        optimizer.zero_grad()
        losses["loss"].backward()
        found += [losses["loss"].detach(), *(parameter.grad.clone() for parameter in parts.module.vit.parameters())]
        optimizer.step()
        if parts.past is not None:
            parts.past.add(batch, losses)
    return found, parts.module.vit.state_dict()


@pytest.mark.parametrize("source", ["weights", "ema", "predictions"])
def test_alpha_0_is_plain_cross_entropy_bit_for_bit(opened, tmp_path, source):
    """Losses, gradients and weights, with a past that predicts; a small alpha is not."""
    unmixed = ["augment.mixup=0", "augment.cutmix=0"]
    expected, weights = learn(opened(*unmixed, "distill.past.weight=0", "distill.label_weight=1"), tmp_path)
    for alpha in (0, 0.1):
        past = opened(*unmixed, f"distill.past.source={source}", f"distill.past.alpha={alpha}")
        found, learned = learn(past, tmp_path / str(alpha))
        assert all(map(torch.equal, found, expected)) == (alpha == 0)
        assert all(torch.equal(learned[name], value) for name, value in weights.items()) == (alpha == 0)


def test_the_average_that_the_run_has_is_the_one_that_teaches(opened):
    """The loop, after its last step."""
    parts, averaged = opened("distill.past.source=ema"), SimpleNamespace(vit=torch.nn.Identity())
    nothing = {"engine": None, "batches": lambda crops: iter(()), "is_missing": lambda *_: False}
    train(SimpleNamespace(ema=SimpleNamespace(module=averaged), step=parts.plan.steps, **nothing), parts)
    assert parts.past.network is averaged.vit and parts.extra_networks == {}


@pytest.mark.faults
def test_a_run_killed_within_an_epoch_repeats_every_bit(finetuning):
    """What taught the second epoch is in the checkpoint of step 10, and nowhere else."""
    given = [*PAST, "log.save_every_epochs=0.625"]
    whole = finetuning("past", *given)
    finetuning("past-killed", *given, witness=True, code=-9, WITNESS_KILL="24")
    again = finetuning("past-killed", *given)
    assert "continues at step 10 of 16" in again.out
    assert (whole.last_checkpoint() / "past.safetensors").is_file()
    same_result(again.run, whole.run)
    assert all(record["loss"] == record["past"] for record in whole.metrics())
    saved = open_run(whole.run)
    assert "labels 0, past 1 (targets mixed with predictions of the weights at" in model_card(saved, saved.vit)
