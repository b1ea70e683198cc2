"""Writing behind the training: what is written, who waits, what a write that fails costs; on one rank and on two."""

import errno
import os
import resource
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maedistill.errors import DataError, NumericsError
from maedistill.runs import checkpoint
from maedistill.runs.async_saver import Saver
from maedistill.runs.checkpoint import latest_step
from maedistill.runs.records import AppendOnlyFile
from maedistill.runs.restore import load_latest
from tests.support.one_tensor import OneTensor


@pytest.fixture
def engine() -> OneTensor:
    return OneTensor()


def save(saver: Saver, engine: OneTensor, step: int) -> None:
    """One step of training, and its checkpoint."""
    engine.weight.fill_(step)
    saver.save(step=step, engine=engine, state={"step": step})


def loaded(folder: Path) -> tuple[int, list[float]]:
    """The step and the weights of the checkpoint that a restart finds."""
    fresh = OneTensor()
    return load_latest(folder, fresh)["step"], fresh.weight.tolist()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing a file of tensors waits until this is set."""
    ready = threading.Event()

    def slow(tensors: dict, path: Path) -> None:
        assert ready.wait(20)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    return ready


@contextmanager
def largest_file(size: int):
    """The kernel refuses to let a file of this process grow beyond so many bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_training_goes_on_during_a_write_and_leaves_no_trace_in_it(tmp_path, engine, disk):
    with Saver(tmp_path, keep=2) as saver:
        save(saver, engine, 1)
        engine.weight.fill_(99)  # training goes on
        assert latest_step(tmp_path) is None
        disk.set()
        saver.finish_write()
        assert loaded(tmp_path) == (1, [1, 1, 1])


def test_the_next_save_waits_for_the_one_under_way(tmp_path, engine, disk):
    with Saver(tmp_path, keep=1) as saver:
        save(saver, engine, 1)
        threading.Timer(0.3, disk.set).start()
        save(saver, engine, 2)
        assert latest_step(tmp_path) in (1, 2)
    assert loaded(tmp_path) == (2, [2, 2, 2])
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000002"]


def test_the_copies_are_let_go_when_they_are_written(tmp_path, engine):
    with Saver(tmp_path, keep=1) as saver:
        save(saver, engine, 1)
        saver._writing.join()
        assert not saver._writing.__dict__.keys() & {"_target", "_args"}


def test_a_full_disk_is_a_warning_costs_no_older_checkpoint_and_the_next_save_works(tmp_path, engine, capsys):
    with Saver(tmp_path, keep=1) as saver:
        save(saver, engine, 1)
        saver.finish_write()
        with largest_file(64):
            save(saver, engine, 2)
            saver.finish_write()
            assert len(saver.failures) == 1
            assert [path.name for path in tmp_path.iterdir()] == ["step_000000001"]
            assert loaded(tmp_path) == (1, [1, 1, 1])
            save(saver, engine, 3)
            saver.finish_write()
        said = capsys.readouterr().err.splitlines()
        assert said[0].startswith(f"warning: saving the checkpoint of step 2 in {tmp_path} failed (")
        assert said[0].endswith("File too large (os error 27)); that of step 1 is intact")
        assert said[1].startswith("  fix: free disk space or correct the permissions there")
        assert len(said) == 4
        save(saver, engine, 4)
    assert saver.failures == []
    assert loaded(tmp_path) == (4, [4, 4, 4])


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EXDEV])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_refuses_a_call_costs_one_checkpoint_and_a_warning(
    tmp_path, engine, monkeypatch, capsys, call, error
):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    lines = AppendOnlyFile(tmp_path / "metrics.jsonl")
    with Saver(tmp_path / "checkpoints", keep=2) as saver:
        save(saver, engine, 1)
        saver.finish_write()
        lines.append("one")
        with monkeypatch.context() as broken:
            broken.setattr(os, call, refuse)
            engine.weight.fill_(2)
            saver.save(step=2, engine=engine, state={"step": 2}, records=[lines])
            saver.finish_write()
        assert len(saver.failures) == 1 and capsys.readouterr().err.count(os.strerror(error)) == 1
        assert loaded(saver.folder) == (1, [1, 1, 1]) and not list(saver.folder.glob("*.tmp"))
        save(saver, engine, 3)
    assert loaded(tmp_path / "checkpoints") == (3, [3, 3, 3])


def test_records_are_on_the_disk_before_the_checkpoint_that_stands_for_them(tmp_path, engine, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), real(file)))
    lines = AppendOnlyFile(tmp_path / "metrics.jsonl")
    lines.append("one")
    with Saver(tmp_path / "runs/a/checkpoints", keep=1, texts={"run.json": "{}"}) as saver:
        saver.save(step=1, engine=engine, state={"step": 1}, records=[lines])
    names = [os.path.basename(path) for path in synced]
    assert names[:2] == ["metrics.jsonl", tmp_path.name]
    assert names.index("a") < names.index("COMPLETE") and names[-1] == "checkpoints"
    assert (tmp_path / "runs/a/checkpoints/step_000000001/run.json").read_text() == "{}"


def test_failures_in_a_row_end_the_run_though_none_was_saved_before(tmp_path, engine):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    saver = Saver(tmp_path / "checkpoints", keep=1)
    for step in (1, 2, 3):
        save(saver, engine, step)
    with pytest.raises(DataError, match=r"step 3 in .*; there is none before it\nfree disk"):
        saver.finish_write()


def test_the_last_write_must_not_fail(tmp_path, engine, capsys):
    for settled in (False, True):
        saver = Saver(tmp_path, keep=1)
        with largest_file(64), pytest.raises(DataError, match="step 5 in"), saver:
            save(saver, engine, 5)
            if settled:
                saver.finish_write()  # also where its failure is known already
        assert capsys.readouterr().err.count("step 5") == settled


def test_a_bug_of_ours_is_raised_as_it_is(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_manifest", lambda folder: [][0])
    saver = Saver(tmp_path, keep=1)
    save(saver, engine, 1)
    with pytest.raises(IndexError):
        saver.finish_write()
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_run_waits_for_the_write_under_way_and_stays_the_error(tmp_path, engine, disk):
    with pytest.raises(NumericsError), Saver(tmp_path, keep=1) as saver:
        save(saver, engine, 1)
        threading.Timer(0.3, disk.set).start()
        raise NumericsError("a cause", "a remedy")
    assert loaded(tmp_path) == (1, [1, 1, 1])


def test_a_write_that_fails_beside_another_error_is_told(tmp_path, engine, capsys):
    with pytest.raises(NumericsError), largest_file(64), Saver(tmp_path, keep=1) as saver:
        save(saver, engine, 1)
        raise NumericsError("a cause", "a remedy")
    assert "warning: saving the checkpoint of step 1" in capsys.readouterr().err


@pytest.mark.faults
def test_a_dead_disk_keeps_no_dead_process_alive(launcher, tmp_path):
    program = f"""
import time
from tests.training import test_saver
from maedistill.runs import checkpoint
from maedistill.runs import async_saver as saver
checkpoint.save_file = lambda tensors, path: time.sleep(600)
saver._PATIENCE = 0.2
with saver.Saver(test_saver.Path({str(tmp_path / "checkpoints")!r}), keep=1) as saver:
    test_saver.save(saver, test_saver.OneTensor(), 1)
    raise SystemExit(4)
"""
    ended = launcher.start_text(tmp_path, program).finish(4)
    assert ended.err == "warning: step 1 is still being written: given up\n"


def test_processes_forked_during_a_write_neither_write_nor_hang(tmp_path):
    size = 300_000  # long enough for several forks
    engine = OneTensor(width=size)
    forks = 0
    with Saver(tmp_path, keep=1) as saver:
        for step in range(1, 6):
            save(saver, engine, step)
            while saver._writing.is_alive():
                child = os.fork()
                if child == 0:
                    torch.zeros(1000).sum()
                    print("a loader worker", file=sys.stderr)
                    os._exit(0)
                deadline = time.monotonic() + 20
                while os.waitpid(child, os.WNOHANG) == (0, 0):
                    if time.monotonic() > deadline:
                        os.kill(child, signal.SIGKILL)
                        raise AssertionError("a forked process hangs")
                    time.sleep(0.001)
                forks += 1
    assert forks >= 5
    fresh = OneTensor(width=size)
    assert load_latest(tmp_path, fresh) == {"step": 5}
    assert torch.equal(fresh.weight, engine.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000005"]


def test_every_rank_hears_how_a_write_ended(runs):
    first, second = runs["failures", 2]
    assert first[:5] == second[:5]
    assert first[:3] == ["no error but None"] * 3  # a failure is known at the next save, and two are warnings
    assert first[3].startswith("DataError: saving the checkpoint of step 4 in ") and "No space left" in first[3]
    assert first[4] == "no error but None"
    assert (first[5], second[5]) == (
        "KeyError: 'a bug'",
        "PeerError: rank 0 failed: KeyError: 'a bug'\nsee rank 0's traceback",
    )
