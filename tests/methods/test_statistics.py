"""Statistics of a teacher's channels: what they make of targets, and that the layout of a run changes nothing."""

import pytest
import torch
from safetensors.torch import load_file

from maedistill.methods.statistics import ChannelStatistics

TEACHER = ["teacher.source=random:vit_tiny_patch16_224", "teacher.width=48", "teacher.depth=2", "teacher.num_heads=2"]
TEACHER += ["teacher.patch_size=8", "method=dmae", "align.student=[1]", "align.teacher=[1]", "optim.epochs=1"]
STORED = [*TEACHER, "align.normalize=stored", "align.distance=cosine_smooth_l1", "align.stored_steps=5"]


def targets(seed: int) -> dict[int, torch.Tensor]:
    """Two taps with a mean and a deviation per channel, and a prefix token of another scale."""
    draw = torch.randn(2, 4, 9, 6, generator=torch.Generator().manual_seed(seed))
    draw = draw * torch.arange(1, 7) + 10 * torch.arange(6)
    draw[:, :, 0] *= 1000
    return {3: draw[0], 7: draw[1] - 50}


def measured(*steps: dict[int, torch.Tensor], most: int) -> ChannelStatistics:
    statistics = ChannelStatistics((3, 7), width=6, prefix=1, steps=most)
    for step, one in enumerate(steps):
        statistics.add(one, step)
        statistics.end_step(step)
    return statistics


def test_measured_targets_have_mean_0_and_deviation_1_and_later_steps_change_nothing():
    torch.testing.assert_close(measured(most=2)(targets(0)), targets(0))
    statistics = measured(*map(targets, range(4)), most=2)
    seen = {t: torch.cat([targets(step)[t] for step in (0, 1)]) for t in (3, 7)}
    for rows in (one[:, 1:].reshape(-1, 6) for one in statistics(seen).values()):
        torch.testing.assert_close(rows.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
        torch.testing.assert_close(rows.std(0, correction=0), torch.ones(6), rtol=0, atol=1e-5)


def test_a_channel_that_was_silent_is_not_blown_up_when_it_fires():
    silent, fires = targets(0), targets(1)
    silent[3][..., 2], fires[3][..., 2] = 0.0, 3.0
    found = measured(silent, most=1)(fires)[3]
    assert 50 < found[:, 1:, 2].max() < 200  # by a hundredth of the channels' mean deviation, which is about 3


def test_a_step_that_is_not_finite_is_not_measured():
    broken = targets(1)
    broken[7][2, 3, 4] = torch.nan
    statistics = measured(targets(0), broken, most=9)
    assert torch.equal(statistics.sums, measured(targets(0), most=9).sums) and statistics.sums.isfinite().all()


def test_until_something_is_measured_the_terms_of_the_teacher_rest():
    broken = {tap: one * torch.nan for tap, one in targets(0).items()}
    assert [bool(measured(*steps, most=9).measured) for steps in ([], [broken], [broken, targets(0)])] == [0, 0, 1]


def test_layouts_measure_the_same(pretraining):
    """1 and 3 ranks, and accumulation: 5 steps of 12 images of 4 patches. In the first step only pixels count."""
    layouts = {"one": (1, []), "three": (3, ["engine.zero=1"]), "parts": (1, ["engine.micro_batch=4"])}
    found = {}
    for name, (ranks, more) in layouts.items():
        ended = pretraining(f"stored-{name}", *STORED, *more, ranks=ranks)
        found[name] = ended.metrics(), load_file(ended.last_checkpoint() / "statistics.safetensors")["sums"]
    metrics, sums = found["one"]
    assert sums.dtype == torch.float64 and set(sums[0].flatten().tolist()) == {5 * 12 * 4}
    assert metrics[0]["loss"] == pytest.approx(metrics[0]["pixels"], rel=1e-6)
    assert metrics[1]["loss"] == pytest.approx(metrics[1]["pixels"] + metrics[1]["align/1"], rel=1e-6)
    for others, theirs in found.values():
        torch.testing.assert_close(theirs, sums, rtol=1e-6, atol=1e-4)
        for ours, other in zip(metrics, others, strict=True):
            assert other["align/1"] == pytest.approx(ours["align/1"], abs=1e-5)
