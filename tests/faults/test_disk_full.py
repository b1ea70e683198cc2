"""A disk that takes no checkpoint: a run with real processes loses nothing, and ends as it would have with room.

The kernel lets no file grow beyond a limit that every file of the run keeps but optimizer.safetensors, which is
what a full disk does to the largest file first. Each run goes on from step 32 of 40 of a finished one.
"""

import json
import resource
import shutil
from pathlib import Path

import pytest

from maedistill.runs.history import read_metrics
from maedistill.runs.restore import newest_intact
from tests.support.waiting import wait_until

GOES_ON = ["method=mae", "optim.epochs=5"]


@pytest.fixture
def unfinished(pretraining, mae, request) -> Path:
    """The finished run, as if it had been killed before its last checkpoint."""
    run = pretraining.folder / request.node.name
    shutil.copytree(mae.run, run)
    shutil.rmtree(run / "checkpoints" / "step_000000040")
    (run / "exit.json").unlink()
    return run


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_same_end(run: Path, reference: Path) -> None:
    last = "checkpoints/step_000000040"
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (run / last / file).read_bytes() == (reference / last / file).read_bytes()


@pytest.mark.parametrize(
    ("every", "step", "failures"), [(1, 40, 1), (0.25, 38, 3)], ids=["the last one", "three in a row"]
)
def test_a_full_disk_ends_a_run_with_exit_3_and_with_room_it_comes_to_the_same_end(
    pretraining, mae, unfinished, every, step, failures
):
    started = pretraining.start(unfinished.name, *GOES_ON, f"log.save_every_epochs={every}", launcher="piped")
    size = (unfinished / "checkpoints" / "step_000000032" / "model.safetensors").stat().st_size
    resource.prlimit(started.pids[0], resource.RLIMIT_FSIZE, (size, size))
    ended = started.finish(3)
    assert f"error: saving the checkpoint of step {step} in " in ended.err
    assert ended.err.count("File too large") == failures
    assert "Traceback" not in ended.err
    assert checkpoints(unfinished) == ["step_000000032"]
    assert newest_intact(unfinished / "checkpoints").name == "step_000000032"
    end = json.loads((unfinished / "exit.json").read_text())
    assert (end["exit_code"], end["step"]) == (3, 32)

    again = pretraining(unfinished.name, *GOES_ON)
    assert "continues at step 32 of 40" in again.out
    assert_same_end(unfinished, mae.run)


def test_a_disk_that_takes_nothing_at_all_for_a_while_costs_nothing(pretraining, mae, unfinished):
    """Not one line of metrics.jsonl; its pictures are left out."""
    started = pretraining.start(
        unfinished.name, *GOES_ON, "log.pictures_every_epochs=0.1", launcher="piped", witness=True, WITNESS_PACE="0.6"
    )
    pid, everything = started.pids[0], resource.RLIM_INFINITY
    wait_until(lambda: 34 <= last_step(unfinished) < 38)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (10, everything))
    wait_until(lambda: "its lines are kept" in started.err and ".png is left out" in started.err)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (everything, everything))
    ended = started.finish()
    assert ended.err.count("metrics.jsonl cannot be written (File too large); its lines are kept") == 1
    assert ".png is left out" in ended.err
    assert [record["step"] for record in read_metrics(unfinished) if "loss" in record] == list(range(1, 41))
    assert_same_end(unfinished, mae.run)


def test_a_disk_that_takes_nothing_ends_a_run_with_exit_3_and_leaves_nothing(pretraining, mae, unfinished):
    # without TensorBoard, whose own thread would print a traceback first
    settings = [*GOES_ON, "log.trackers=[]"]
    started = pretraining.start(unfinished.name, *settings, launcher="piped", witness=True, WITNESS_PACE="0.6")
    wait_until(lambda: 34 <= last_step(unfinished) < 38)
    resource.prlimit(started.pids[0], resource.RLIMIT_FSIZE, (10, 10))
    ended = started.finish(3)
    assert "Traceback" not in ended.err and "exit.json could not be written" in ended.err
    assert not list(unfinished.rglob("*.tmp"))
    assert checkpoints(unfinished) == ["step_000000032"]
    pretraining(unfinished.name, *GOES_ON)
    assert [record["step"] for record in read_metrics(unfinished) if "loss" in record] == list(range(1, 41))
    assert_same_end(unfinished, mae.run)


def last_step(run: Path) -> int:
    """The last that has a record; 40 until the start has opened its records."""
    return max(record["step"] for record in read_metrics(run))


def test_one_checkpoint_that_cannot_be_written_is_a_warning_and_the_run_goes_on(pretraining, mae, unfinished):
    (unfinished / "checkpoints" / "step_000000036.tmp").write_text("a file where a folder must be")
    ended = pretraining(unfinished.name, *GOES_ON, "log.save_every_epochs=0.25", "log.keep=9")
    assert "warning: saving the checkpoint of step 36 in " in ended.err
    assert "that of step 34 is intact\n  fix: free disk" in ended.err
    steps = [32, 34, 38, 40]
    assert [f"step_{step:09d}" for step in steps] == [name for name in checkpoints(unfinished) if "tmp" not in name]
    assert_same_end(unfinished, mae.run)
