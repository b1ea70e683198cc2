"""Distillation in fine-tuning end to end, in real processes: a convolutional teacher, a run of ours, a kill.

The convolutional teacher has random weights, another normalisation and resolution; the other is the run `tuned`.
"""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from maedistill.exporting.card import model_card
from maedistill.weights.from_run import open_run
from maedistill.weights.open_network import open_network
from tests.conftest import SCRATCH, two_at_a_time
from tests.faults.notes import same_result

STUDENT = [*SCRATCH, "student.register_tokens=1", "optim.epochs=2", "optim.layer_decay=1"]
STOPPED = 14  # of 16 steps; after it no term counts, and the teacher rests
CONVOLUTIONAL = ["distill.logits={weight: 9, temperature: 2, standardize: true, stop_epoch: 1.75}"]
CONVOLUTIONAL += ["distill.hints={weight: 1, student: [0, 1], teacher: [1, 3], warmup_epochs: 1, stop_epoch: 1.75}"]
CONVOLUTIONAL += ["distill.attention_transfer={weight: 10, student: [1], teacher: [4], stop_epoch: 1}"]
CONVOLUTIONAL += ["distill.contrastive={weight: 2, stop_epoch: 1.5}"]
VIT = ["distill.label_weight=0", "distill.logits.weight=1", "distill.hard_label={weight: 1, token: true}"]
VIT += [
    "distill.attention={weight: 1, student: [1], teacher: [1]}",
    "distill.rkd_distance.weight=25",
    "distill.rkd_angle.weight=50",
]
VIT += ["distill.token_relations={weight: 1, student: [1], teacher: [0], num_heads: 4}"]
PLAIN = ["augment.mixup=0", "augment.cutmix=0", "augment.erasing=0", "student.drop_path=0", "optim.ema=null"]
PLAIN += ["distill.contrastive.weight=0", "distill.contrastive.stop_epoch=null"]  # which micro-batches would change


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A folder of timm's with a small ResNet for images of 48 px."""
    folder = tmp_path_factory.mktemp("teacher") / "resnet"
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=3)
    images = {"input_size": (3, 48, 48), "mean": (0.4, 0.3, 0.2), "std": (0.3, 0.25, 0.2), "crop_pct": 1.0}
    save_for_hf(network, folder, safe_serialization=True, data_config=images | {"interpolation": "bicubic"})
    return folder


def taught_by(resnet) -> list[str]:
    """The settings of the run that the convolutional teacher teaches."""
    return [*STUDENT, f'distill.teachers=["local-dir:{resnet}"]', *CONVOLUTIONAL]


@pytest.fixture(scope="module")
def taught(finetuning, resnet):
    """The run that the convolutional teacher teaches."""
    return finetuning("taught", *taught_by(resnet))


@pytest.fixture(scope="module")
def runs(finetuning, tuned, resnet, taught):
    """All runs of this file by name, two at a time."""
    convolutional = taught_by(resnet)
    vits = [*STUDENT, f'distill.teachers=["run:{tuned.run}"]', *VIT]

    starts = {
        "zero 3": lambda: finetuning("taught-zero-3", *convolutional, "engine.zero=3", "optim.ema=null", witness=True),
        "plain": lambda: finetuning("taught-plain", *convolutional, *PLAIN),
        "two ranks": lambda: finetuning("two-ranks", *convolutional, *PLAIN, "engine.zero=2", ranks=2),
        "vit": lambda: finetuning("taught-by-vit", *vits, "engine.zero=1"),
    }
    return two_at_a_time(lambda name: starts[name](), starts) | {"convolutional": taught}


def test_a_convolutional_teacher_teaches_a_vit_through_logits_features_and_relations(runs, resnet):
    ended = runs["convolutional"]
    steps = ended.metrics()
    names = {"cross_entropy", "logits", "hints/0-1", "hints/1-3", "attention_transfer/1-4", "contrastive"}
    for i, step in enumerate(steps):
        assert {name for name in names if np.isfinite(step.get(name, np.nan))} == (
            names if i < STOPPED else {"cross_entropy"}
        )
        assert step["loss"] == pytest.approx(expected_loss(step, epoch=i / 8), rel=1e-5)
        assert step["weight/hints"] == pytest.approx(min(i / 8, 1) if i < STOPPED else 0)
        assert (step["weight/attention_transfer"], step["weight/logits"]) == (
            10 if i < 8 else 0,
            9 if i < STOPPED else 0,
        )
    first, last = (np.mean([step["logits"] for step in part]) for part in (steps[:4], steps[STOPPED - 4 : STOPPED]))
    assert last < first
    metadata = json.loads((ended.run / "run.json").read_text())
    assert metadata["teacher"].startswith(f"local-dir:{resnet}") and metadata["license"] == "apache-2.0"
    held = load_file(ended.last_checkpoint() / "model.safetensors")
    assert {name.split(".")[0] for name in held} == {"vit", "terms"}, "projectors are kept to go on with"
    assert open_network(str(ended.run), "classifier").module.num_classes == 3


def test_the_card_of_an_export_names_the_teacher_and_the_losses(runs, resnet):
    saved = open_run(runs["convolutional"].run)
    card = model_card(saved, saved.vit)
    for part in (
        "- Teacher of the fine-tuning: local-dir:PATH",
        "- Losses, with their weights: labels 1, logits 9, hints 1, attention_transfer 10, contrastive 2.",
        "Fine-tuned with a teacher",
        "- knowledge-distillation",
        "whose license applies to them as well: **apache-2.0**",
    ):
        assert part in card, part


def expected_loss(step, *, epoch):
    """The sum that the settings say, from what is logged."""
    if epoch >= 1.75:
        return step["cross_entropy"]
    hints = min(epoch, 1) * (step["hints/0-1"] + step["hints/1-3"]) / 2
    maps = 10 * step["attention_transfer/1-4"] if epoch < 1 else 0
    contrast = 2 * step["contrastive"] if epoch < 1.5 else 0
    return step["cross_entropy"] + 9 * step["logits"] + hints + maps + contrast


@pytest.mark.faults
def test_a_killed_run_goes_on_bit_by_bit(finetuning, taught, resnet):
    """Killed in step 11, after the checkpoint of step 8."""
    before = finetuning("taught-killed", *taught_by(resnet), witness=True, code=-9, WITNESS_KILL="22")
    assert before.last_checkpoint().name == "step_000000008"
    ended = finetuning("taught-killed", *taught_by(resnet))
    assert "continues at step 8 of 16" in ended.out
    same_result(ended.run, taught.run)


def test_a_run_does_not_go_on_with_another_teacher_in_the_place_of_its_own(finetuning, runs, resnet):
    run, weights = runs["convolutional"].run, resnet / "model.safetensors"
    record, original = (run / "run.json").read_text(), weights.read_bytes()
    changed = load_file(weights)
    changed["fc.weight"] *= 100
    save_file(changed, weights, metadata={"format": "pt"})
    try:
        refused = finetuning(run.name, *taught_by(resnet), code=2)
    finally:
        weights.write_bytes(original)
    error, remedy = refused.err.splitlines()
    assert f"{run} has learned from a teacher with other weights" in error and "use another run=" in remedy
    assert (run / "run.json").read_text() == record


def test_cut_up_weights_learn_the_same(runs):
    """ZeRO 3, whose stale gradients of what rests would show in the norms."""
    for ours, theirs in zip(runs["zero 3"].metrics(), runs["convolutional"].metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), ours["step"]


def test_two_ranks_learn_the_same(runs):
    """Where nothing is drawn per rank and no term relates the images of a micro-batch."""
    for ours, theirs in zip(runs["two ranks"].metrics(), runs["plain"].metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), ours["step"]


def test_a_run_teaches_without_labels_by_attention_relations_and_a_token(runs, tuned):
    ended = runs["vit"]
    names = {"logits", "hard_label", "attention/1-1", "token_relations/1-0/qk", "token_relations/1-0/vv"}
    for step in ended.metrics():
        assert names <= step.keys() and "cross_entropy" not in step
        sum_of_terms = sum(step[name] for name in names) + 25 * step["rkd_distance"] + 50 * step["rkd_angle"]
        assert step["loss"] == pytest.approx(sum_of_terms, rel=1e-5)
    assert f"teacher  run:{tuned.run}" in ended.out and "labels   weight 0, none is read" in ended.out


def test_a_run_names_teacher_license_and_terms(taught, resnet):
    lines = taught.out.splitlines()
    (teacher,) = (line for line in lines if line.startswith("teacher"))
    assert f"local-dir:{resnet}" in teacher and "license apache-2.0" in teacher and "sees 48 px" in teacher
    terms = [line.removeprefix("term     ") for line in lines if line.startswith("term ")]
    assert terms == [
        "logits 9, to epoch 1.75, temperature 2, standardize True",
        "hints 1, warm-up 1, to epoch 1.75, student [0, 1], teacher [1, 3], projector linear, normalize none",
        "attention_transfer 10, to epoch 1, student [1], teacher [4]",
        "contrastive 2, to epoch 1.5, temperature 0.07, width 128, within micro-batches of 6",
    ]
