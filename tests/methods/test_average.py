"""The student's moving average as teacher: what it follows, what it shows, and a kill that loses nothing."""

import math
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file

from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.losses.features import mean_of_blocks
from maedistill.pretraining.setup import Pretraining, open_pretraining
from tests.faults.notes import same_result

EMA = ["method=amd", "teacher.source=ema", "masks.teacher_keep_ratio=1", "decoder.attention=cross"]
EMA += ["generate.by=decoder", "align.student=[1]", "align.teacher=[1]", "align.distance=smooth_l1"]
EMA += ["align.normalize=none", "align.last_blocks=2", "align.warmup_share=0.25", "teacher.decay=[0.9, 0.99]"]


@pytest.fixture
def opened(pretraining):
    """Opens the parts of a run of 24 steps."""

    def open_parts(*settings: str) -> Pretraining:
        config = load_config(pretraining.config, [*EMA, *settings], root=PretrainConfig, to_run=False).config
        return open_pretraining(config, world_size=1, device=torch.device("cpu"))

    return open_parts


def weights(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def train(parts: Pretraining, steps: int) -> list[torch.Tensor]:
    """Change the student at random and let the teacher follow; the student's weights after each step."""
    seen, generator = [], torch.Generator().manual_seed(0)
    for step in range(steps):
        with torch.no_grad():
            for parameter in parts.module.encoder.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        parts.end_step(step)
        seen.append(weights(parts.module.encoder))
    return seen


def test_the_average_after_some_steps_is_the_sum_of_the_formula(opened):
    """With one decay d: d^k theta_0 + (1 - d) sum of d^(k-i) theta_i."""
    parts, d, k = opened("teacher.decay=[0.8, 0.8]"), 0.8, 5
    start = weights(parts.teachers[0].teacher.network).double()
    seen = train(parts, k)
    expected = d**k * start + (1 - d) * sum(d ** (k - i) * one.double() for i, one in enumerate(seen, 1))
    torch.testing.assert_close(weights(parts.teachers[0].teacher.network).double(), expected, rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in parts.teachers[0].teacher.parameters())


def test_the_decay_rises_by_a_half_cosine_to_the_last_step(opened):
    teacher = opened("teacher.decay=[0.999, 0.9999]").teachers[0].teacher
    assert teacher.steps == 24
    teacher.steps = 101
    assert [teacher.decay_at(step) for step in (0, 50, 100)] == pytest.approx([0.999, 0.99945, 0.9999], abs=1e-12)
    assert teacher.decay_at(25) == pytest.approx(0.9999 - 0.0009 * (1 + math.cos(math.pi / 4)) / 2, abs=1e-12)


def test_the_target_is_what_the_student_itself_shows_of_all_patches(opened):
    """At the start. The ramp is that of the first quarter; the deviation is over patches of all images."""
    parts = opened("student.drop_path=0.5")
    images, split = parts.inputs(torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8), torch.arange(3))
    (target,), notes = parts.teach(images, split)
    student = deepcopy(parts.module.encoder).eval()
    _, outputs = student((images - parts.module.mean) / parts.module.std, split.order, taps=(0, 1))
    torch.testing.assert_close(target, {1: mean_of_blocks([outputs[0], outputs[1]])})
    assert float(notes["target_std"]) == pytest.approx(
        float(target[1][:, 1:].reshape(-1, 32).std(dim=0).mean()), rel=1e-5
    )
    ramps = []
    for step in (0, 3, 6, 23):
        parts.begin_step(step)
        ramps.append(float(parts.module.ramp))
    assert ramps == [0.0, 0.5, 1.0, 1.0]


def test_a_collapse_is_warned_of_once(opened, capsys):
    parts = opened()
    for means in ({"loss": 1.0}, {"target_std": 0.11}, {"target_std": math.nan}):
        parts.warn_of_collapse(means)
    assert capsys.readouterr().err == ""
    for means in ({"target_std": 0.09}, {"target_std": 0.08}):
        parts.warn_of_collapse(means)
    assert capsys.readouterr().err.count("warning: ") == 1
    constant = {1: torch.ones(3, 17, 32)}
    assert float(parts.teachers[0].teacher.deviation(constant)) == 0


@pytest.mark.faults
def test_a_killed_run_goes_on_bit_by_bit_and_ranks_change_nothing_but_rounding(pretraining):
    """The average is in the checkpoint and nowhere else."""
    given = [*EMA, "optim.ema=0.9"]
    whole = pretraining("average", *given)
    pretraining("average-killed", *given, witness=True, code=-9, WITNESS_KILL="21")
    again = pretraining("average-killed", *given)
    assert "continues at step 16 of 24" in again.out and "teacher  ema" in whole.out
    same_result(again.run, whole.run)
    two = pretraining("average-two", *given, "engine.zero=2", ranks=2)
    ours, theirs = (load_file(run.last_checkpoint() / "teacher.safetensors") for run in (two, whole))
    for name, value in ours.items():
        if not name.endswith("qkv.bias"):  # see tests/test_pretrain.py
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-4)
    assert all(0.1 < record["target_std"] <= 1 for record in whole.metrics())


UNSEEDED = """
import os, sys
import timm, torch
import maedistill

class Look(maedistill.Callback):
    def on_start(self, run):
        networks = run.extra_networks["teacher"], run.module.encoder
        pairs = zip(*(network.state_dict().values() for network in networks), strict=True)
        print("equal" if all(torch.equal(*pair) for pair in pairs) else "differs", flush=True)

torch.manual_seed(int(os.environ["RANK"]))
sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
student = timm.create_model("vit_tiny_patch16_224", **sizes)
settings = [*sys.argv[3:], f"run={sys.argv[2]}", "optim.epochs=1", "optim.ema=null"]
maedistill.pretrain(sys.argv[1], settings, student=student, callbacks=[Look()])
"""


def test_ranks_whose_students_differ_begin_with_one_average(pretraining, launcher, tmp_path):
    """That of rank 0, as the engine gives all ranks rank 0's student."""
    (tmp_path / "program.py").write_text(UNSEEDED)
    words = [tmp_path / "program.py", pretraining.config, tmp_path / "run", *EMA]
    ended = launcher.start(tmp_path / "run", words, ranks=2).finish()
    assert (ended.out.count("equal"), ended.out.count("differs")) == (2, 0)
