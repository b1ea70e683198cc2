"""Disks without room or inodes, few open files: a save that fails is a warning, the checkpoint of before stands."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from maedistill.errors import DataError
from maedistill.runs.async_saver import Saver
from maedistill.runs.records import AppendOnlyFile, write_text
from maedistill.runs.restore import newest_intact
from tests.support.one_tensor import OneTensor


@pytest.fixture
def tmpfs(tmp_path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A file system in memory, and what changes its options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")

    if os.geteuid():
        pytest.skip("mounting needs root")
    mount("size=10m")
    yield folder, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", "--lazy", folder], check=True)  # a run may still write, if the test has failed


@pytest.mark.parametrize("bound", ["size=700k", "nr_inodes=12"])
def test_a_tiny_disk_keeps_the_checkpoint_of_before_and_every_line(tmpfs, capsys, bound):
    (disk, remount), free = tmpfs, {"size=700k": "size=10m", "nr_inodes=12": "nr_inodes=100"}[bound]
    remount(bound)
    lines = AppendOnlyFile(disk / "metrics.jsonl")

    def save(step: int) -> None:
        lines.append(f"{step}")
        saver.save(step=step, engine=OneTensor(1, width=40_000), state={"step": step}, records=[lines])
        saver.finish_write()

    with Saver(disk / "checkpoints", keep=2) as saver:
        save(1)
        save(2)
        assert len(saver.failures) == 1 and "No space left" in capsys.readouterr().err
        assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step_000000001"]
        with pytest.raises(OSError, match="No space left"):
            for number in range(20):
                (disk / f"filler{number}").write_bytes(bytes(100_000))
        with pytest.raises(DataError, match="No space left"):
            write_text(disk / "run.json", "{}" * 100_000)
        assert not list(disk.glob(".run.json*"))
        assert newest_intact(disk / "checkpoints").name == "step_000000001"
        remount(free)
        save(3)
    assert newest_intact(disk / "checkpoints").name == "step_000000003"
    assert (disk / "metrics.jsonl").read_text().split() == ["1", "2", "3"]


def test_a_run_needs_no_more_than_64_open_files(pretraining, mae):
    started = pretraining.start("few_files", "method=mae", "optim.epochs=5", "data.workers=2")
    resource.prlimit(started.pids[0], resource.RLIMIT_NOFILE, (64, 64))
    ended = started.finish()
    assert (ended.last_checkpoint() / "model.safetensors").read_bytes() == (
        mae.last_checkpoint() / "model.safetensors"
    ).read_bytes()
