"""The flag of the last update, which is read one step late, and the checkpoints that are written between steps."""

from types import SimpleNamespace

import pytest
import torch

from maedistill.errors import NumericsError
from maedistill.runs.nonfinite import NonfinitePolicy
from maedistill.runs.progress import Progress
from maedistill.runs.run import Run


def test_every_checkpoint_knows_of_the_last_update(tmp_path):
    """Also one that is written before a step, as of a run that ends while it waits for a peer."""
    policy = NonfinitePolicy(tmp_path / "lines", most=3, sample_names=lambda step: [f"of step {step}"])
    saved, progress = [], Progress(step=4)
    run = SimpleNamespace(
        nonfinite=policy,
        progress=progress,
        step=4,
        before_save=[],
        bad_samples=SimpleNamespace(count=lambda progress: None),
        averages=SimpleNamespace(totals=dict),
        clock=SimpleNamespace(seconds=0.0),
        saver=SimpleNamespace(save=lambda *, state, **more: saved.append(state)),
        **dict.fromkeys(("engine", "extra_networks", "_records")),
    )
    policy.check(progress, torch.tensor(True), now=False)
    Run.save(run)
    assert (saved[0]["nonfinite"], saved[0]["nonfinite_in_a_row"]) == (1, 1)
    progress.step = 5
    policy.check(progress, torch.tensor(False), now=True)
    assert (progress.nonfinite, progress.nonfinite_in_a_row) == (1, 0)


def test_the_run_ends_also_if_the_next_flag_arrives_at_the_same_time(tmp_path):
    policy = NonfinitePolicy(tmp_path / "lines", most=0, sample_names=lambda step: [])
    progress = Progress(step=4)
    policy.check(progress, torch.tensor(True), now=False)
    progress.step = 5
    with pytest.raises(NumericsError, match="of step 4 is not finite, 1 in a row"):
        policy.check(progress, torch.tensor(False), now=True)
