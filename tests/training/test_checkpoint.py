"""The folder protocol of checkpoints, without DeepSpeed: torn, damaged, stray, pruned, durable, hostile."""

import hashlib
import itertools
import json
import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maedistill.errors import DataError
from maedistill.runs import checkpoint
from maedistill.runs.async_saver import Saver
from maedistill.runs.checkpoint import latest_step, take_snapshot, write_snapshot
from maedistill.runs.manifest import COMPLETE, MANIFEST, CorruptCheckpoint, verify
from maedistill.runs.restore import load_latest, newest_intact, read_weights
from maedistill.runs.state import checkpoint_name
from tests.support.checkpoints import renew_manifest
from tests.support.forked import exit_code, fork
from tests.support.one_tensor import OneTensor


def save(folder: Path, step: int, *, keep: int = 9) -> Path:
    snapshot = take_snapshot(step=step, engine=OneTensor(step), state={"at": step})
    write_snapshot(folder, snapshot, keep=keep)
    return folder / checkpoint_name(step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_of_several_is_loaded_and_old_ones_go(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, keep=2)
    engine = OneTensor(0)
    assert load_latest(tmp_path, engine) == {"at": 10}
    assert engine.weight.tolist() == [10, 10, 10]
    assert names(tmp_path) == ["step_000000002", "step_000000010"]
    assert latest_step(tmp_path) == 10
    assert read_weights(tmp_path / "step_000000002")["w"].tolist() == [2, 2, 2]


def test_what_cannot_be_removed_costs_no_new_checkpoint(tmp_path, capsys):
    (tmp_path / "step_000000001.tmp").write_text("a file where a folder should be")
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_000000001.tmp", "step_000000002"]
    assert "step_000000001.tmp could not be removed" in capsys.readouterr().err


def test_no_checkpoint_is_no_error(tmp_path):
    (tmp_path / "step_000000001.tmp").mkdir()  # killed during its first save
    for folder in (tmp_path, tmp_path / "absent"):
        assert load_latest(folder, OneTensor(0)) is None
        assert latest_step(folder) is None


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    good, newest = save(tmp_path, 1), save(tmp_path, 2)
    for file in sorted(newest.iterdir()):
        data = file.read_bytes()
        for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b"", data + b" "):
            file.write_bytes(damaged)
            assert newest_intact(tmp_path) == good, file.name
        file.unlink()
        assert newest_intact(tmp_path) == good, file.name
        file.write_bytes(data)
    assert newest_intact(tmp_path) == newest


def test_a_damaged_checkpoint_is_named_passed_over_and_replaced_later(tmp_path, capsys):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (newest / "optimizer.safetensors").write_bytes(b"x")
    assert load_latest(tmp_path, OneTensor(0)) == {"at": 1}
    assert "step_000000002 is damaged (optimizer.safetensors is missing or has another size)" in capsys.readouterr().err
    save(tmp_path, 2, keep=1)
    assert load_latest(tmp_path, OneTensor(0)) == {"at": 2}
    assert names(tmp_path) == ["step_000000002"]


def test_a_copy_under_another_name_is_passed_over_and_never_taken_for_the_real_one(tmp_path, capsys):
    own = save(tmp_path, 1)
    for name in ("step_999999998", "step_000000002"):
        shutil.copytree(own, tmp_path / name)
    assert newest_intact(tmp_path) == own and latest_step(tmp_path) == 1
    assert load_latest(tmp_path, OneTensor(0)) == {"at": 1}
    said = "step_999999998 is damaged (state.json belongs to another step): skipped"
    assert capsys.readouterr().err.count(said) == 2
    save(tmp_path, 2)
    assert load_latest(tmp_path, OneTensor(0)) == {"at": 2} and latest_step(tmp_path) == 2


ODD = {
    f"{file} {how}": (file, change)
    for file in ("COMPLETE", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
    for how, change in {
        "as a folder": lambda path: (path.unlink(), path.mkdir()),
        "as a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
        "as a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
        "of zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
        "doubled": lambda path: path.write_bytes(path.read_bytes() * 2),
    }.items()
} | {
    "a file for a folder": (".", lambda path: (shutil.rmtree(path), path.write_text("x"))),
    "a folder without files": (".", lambda path: (shutil.rmtree(path), path.mkdir())),
}


def test_damaged_and_odd_checkpoints_fall_back_to_the_last_whole_one(tmp_path):
    for number, (name, (file, change)) in enumerate(ODD.items()):
        folder = tmp_path / str(number)
        save(folder, 1)
        change(save(folder, 2) / file)
        engine = OneTensor(0)
        assert load_latest(folder, engine) == {"at": 1} and engine.weight.tolist() == [1, 1, 1], name


def test_pruning_never_counts_damaged_later_ones(tmp_path):
    (save(tmp_path, 9) / "COMPLETE").unlink()
    for step in (1, 2):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step_000000002", "step_000000009"]


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(tmp_path):
    (save(tmp_path, 1) / "COMPLETE").unlink()
    with pytest.raises(DataError, match=r"no checkpoint in .* is intact: step_000000001"):
        load_latest(tmp_path, OneTensor(0))
    assert latest_step(tmp_path) is None


def test_a_checkpoint_of_another_model_is_refused_by_tensor_name(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(
        DataError, match=r"another model: 1 tensors differ, first w: \(3,\) in model.safetensors, \(4,\) in the model"
    ):
        load_latest(tmp_path, OneTensor(0, width=4))


def test_reading_an_average_that_was_not_saved_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"ema\.safetensors cannot be used: the checkpoint has no such file"):
        read_weights(save(tmp_path, 1), "ema")


def test_nothing_leads_out_of_the_folder(tmp_path):
    inside = save(tmp_path, 1)
    (inside / "model.safetensors").rename(tmp_path / "model.safetensors")
    manifest = (inside / MANIFEST).read_text().replace("model.safetensors", "../model.safetensors")
    (inside / MANIFEST).write_text(manifest)
    (inside / COMPLETE).write_text(hashlib.sha256(manifest.encode()).hexdigest())
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json is no list of files"):
        verify(inside)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", b"[" * 99_999),
        ("state.json", b"\xff"),
        ("state.json", b" " * 1_000_001),
        ("state.json", b'{"step": 1, "engine": {"updates": 1e999}, "loop": {}}'),
        ("state.json", b'{"step": 1, "engine": {"updates": %s}, "loop": {}}' % (b"9" * 400)),
        ("state.json", b'{"step": 1, "engine": {"updates": NaN}, "loop": {}}'),
        ("state.json", b'{"step": 2, "engine": {"updates": 1}, "loop": {}}'),
        ("state.json", b'{"step": 1, "engine": {"updates": 1}}'),
        ("state.json", b'{"step": true, "engine": {"updates": 1}, "loop": {}}'),
        *(
            ("state.json", b'{"step": 1, "engine": %s, "loop": %s}' % (engine, loop))
            for engine, loop in [
                (b'{"updates": -5}', b"{}"),
                (b'{"updates": 1e300}', b"{}"),
                (b'{"updates": 1, "scale": 0}', b"{}"),
                (b'{"updates": 1, "finite_updates": 2000}', b"{}"),
                (b'{"updates": 1}', b'{"shift": -5}'),
                (b'{"updates": 1}', b'{"shift": %d}' % 2**62),
                (b'{"updates": 1}', b'{"nonfinite": -1}'),
                (b'{"updates": 1}', b'{"step": 1, "trained_seconds": 1e999}'),
                (b'{"updates": 1}', b'{"growth": {"epochs": [3, -3]}}'),
                (b'{"updates": 1}', b'{"losses": {"loss": [-1e999, 1.0]}}'),
            ]
        ),
        ("model.safetensors", b""),
        ("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        ("optimizer.safetensors", (2).to_bytes(8, "little") + b"{}"),
    ],
)
def test_odd_content_under_a_true_manifest_is_refused_and_changes_nothing(tmp_path, file, content):
    written = save(tmp_path, 1)
    (written / file).write_bytes(content)
    renew_manifest(written)
    engine = OneTensor(0)
    with pytest.raises(DataError, match=file):
        load_latest(tmp_path, engine)
    assert engine.weight.tolist() == [0, 0, 0]


def test_a_state_that_is_not_plain_fails_at_saving_time(tmp_path):
    for value in (math.nan, torch.zeros(1), {1, 2}):
        with pytest.raises((TypeError, ValueError)):
            take_snapshot(step=1, engine=OneTensor(1), state={"value": value})


def test_an_intact_checkpoint_of_the_same_step_is_left_alone(tmp_path):
    before = (save(tmp_path, 1) / "COMPLETE").stat().st_mtime_ns
    assert (save(tmp_path, 1) / "COMPLETE").stat().st_mtime_ns == before


@pytest.mark.faults
def test_after_a_kill_at_any_call_of_a_save_the_newest_intact_one_loads(tmp_path):
    """Real processes, killed inside the thread of a real Saver: before its k-th call, or after half of a write.

    The next save removes what a kill left.
    """
    points = 0
    for point in itertools.count():
        folder = tmp_path / str(point)
        save(folder, 1)
        (folder / "step_000000000.tmp").mkdir()  # an earlier kill left it
        (folder / "step_000000000.tmp" / "state.json").touch()
        code = exit_code(fork(partial(save_and_die, folder, point)))
        assert load_latest(folder, OneTensor(0)) in ([{"at": 1}, {"at": 2}] if code else [{"at": 2}])
        save(folder, 3, keep=1)
        assert names(folder) == ["step_000000003"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
        points += 1
    assert points >= 30


def save_and_die(folder: Path, point: int) -> None:
    kill_at(point)
    saver = Saver(folder, keep=1)
    saver.save(step=2, engine=OneTensor(2), state={"at": 2})
    saver.close()


def kill_at(point: int) -> None:
    """Let this process kill itself at the `point`-th of the calls that change or read files."""
    remaining = itertools.count(point, -1)

    def lethal(real, half):
        def call(*args, **kwargs):
            if next(remaining) == 0:
                half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    def half_a_file(tensors, path):
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)

    for name in ("open", "fsync", "mkdir", "rename", "rmdir", "unlink"):
        setattr(os, name, lethal(getattr(os, name), lambda *args: None))
    real_write = os.write
    os.write = lethal(real_write, lambda file, data: real_write(file, data[: len(data) // 2]))
    checkpoint.save_file = lethal(save_file, half_a_file)


def test_files_and_folder_are_on_the_disk_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    events, descriptors = [], {}
    real_open, real_sync, real_rename = os.open, os.fsync, Path.rename

    def opened(path, *args, **kwargs):
        descriptor = real_open(path, *args, **kwargs)
        descriptors[descriptor] = Path(path).name
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda d: (events.append(descriptors[d]), real_sync(d)))
    monkeypatch.setattr(Path, "rename", lambda s, t: (events.append(f"-> {t.name}"), real_rename(s, t))[1])
    final = save(tmp_path, 7)
    *files, folder, rename, parent = events
    assert sorted(set(files)) == sorted(path.name for path in final.iterdir())
    assert files[-2:] == ["manifest.json", "COMPLETE"]
    assert (folder, rename, parent) == ("step_000000007.tmp", "-> step_000000007", tmp_path.name)


def test_no_file_needs_unpickling(tmp_path):
    final = save(tmp_path, 1)
    assert names(final) == [
        "COMPLETE",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert json.loads((final / "state.json").read_text()) == {"step": 1, "engine": {"updates": 1.0}, "loop": {"at": 1}}
