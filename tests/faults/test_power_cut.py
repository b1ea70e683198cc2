"""Power cuts: after any of them a run goes on from its last checkpoint, whatever the disk had not yet taken.

A shim (tests/support/power_cut.py) drops what a real run had not synced, at every call that changes the disk. And where
this system lets us mount an image of ext4, the file system itself is cut off while a run writes.
"""

import fcntl
import json
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError
from maedistill.runs.folder import RunFolder
from maedistill.runs.metrics import MetricsFile
from maedistill.runs.previous import CONFIG, METADATA, Previous, read_previous
from maedistill.runs.restore import newest_intact
from tests.faults.notes import losses, same_result
from tests.support.checkpoints import renew_manifest
from tests.support.launch import Start
from tests.support.waiting import wait_until

SETTINGS = ["method=mae", "optim.epochs=2", "optim.ema=0.9", "log.trackers=[]"]
SETTINGS += ["log.pictures_every_epochs=null", "log.knn_every_epochs=null"]


@pytest.fixture(scope="module")
def recorded(pretraining, tmp_path_factory) -> tuple[Path, Path]:
    """A run of two epochs, and what a cut at each of its calls would have left of it."""
    out = tmp_path_factory.mktemp("cuts") / "cuts"
    run = pretraining.folder / "power_cut"
    pretraining(run.name, *SETTINGS, FAULTS_CUTS=f"{run}:{out}")
    return run, out


@pytest.fixture(scope="module")
def start(recorded, pretraining):
    """What a start asks of a run folder before anything is written; returns what it knows of the run."""
    run, _ = recorded
    metadata = json.loads((run / METADATA).read_text())
    config = load_config(
        pretraining.config, [*SETTINGS, f"run={run}", "engine.precision=fp32"], root=PretrainConfig
    ).config

    def ask(folder: Path, **changes: Any) -> Previous:
        RunFolder(folder).check(config.model_copy(update=changes), metadata, fresh=False, extend=False)
        return read_previous(folder, config)

    return ask


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("step_")) if checkpoint else 0


def test_after_every_cut_the_newest_saved_checkpoint_is_continued_and_its_records_are_there(recorded, start, tmp_path):
    run, out = recorded
    told, seen, reference = set(), set(), losses(run)
    for cut in sorted(out.glob("*.json")):
        said = json.loads(cut.read_text())
        for kind in ("missing", "present"):
            folder, where = out / f"{cut.stem}-{kind}", f"{cut.stem}-{kind} after {said['op']}"
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            left = (said["saved"], *((path.relative_to(folder), path.stat().st_ino) for path in files))
            if left in seen:
                continue
            seen.add(left)
            checkpoint = newest_intact(folder / "checkpoints")
            step = step_of(checkpoint)
            assert step >= said["saved"], where
            previous = start(folder)
            assert not checkpoint or (previous.config and previous.metadata["stage"] == "pretrain"), where
            for file in checkpoint.iterdir() if checkpoint else ():
                whole = run / "checkpoints" / checkpoint.name / file.name
                assert file.read_bytes() == whole.read_bytes(), f"{where}: {file.name}"
            told.add(step)
            shutil.copytree(folder, tmp_path / folder.name)
            MetricsFile(tmp_path / folder.name, first_step=step)
            assert losses(tmp_path / folder.name) == [record for record in reference if record["step"] <= step], where
    assert told == {0, 8, 16} and len(list(out.glob("*.json"))) > 50


@pytest.mark.parametrize("kind", ["missing", "present"])
def test_a_run_that_was_cut_ends_with_the_same_bytes(recorded, pretraining, kind):
    run, out = recorded
    cuts = [cut for cut in sorted(out.glob("*.json")) if json.loads(cut.read_text())["saved"] == 8]
    folder = pretraining.folder / f"power_cut_{kind}"
    shutil.copytree(out / f"{cuts[len(cuts) // 2].stem}-{kind}", folder, copy_function=shutil.copyfile)
    pretraining(folder.name, *SETTINGS)
    same_result(folder, run)


EMPTIED = {
    "gone": lambda file: file.unlink(),
    "empty": lambda file: os.truncate(file, 0),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "torn at a line": lambda file: file.write_text("".join(file.read_text().splitlines(keepends=True)[:3])),
}


@pytest.mark.parametrize("how", EMPTIED)
def test_no_record_that_is_lost_blocks_a_whole_checkpoint(recorded, start, tmp_path, capsys, how):
    run, _ = recorded
    for name in (METADATA, CONFIG, "metrics.jsonl"):
        folder = tmp_path / name
        shutil.copytree(run, folder)
        EMPTIED[how](folder / name)
        previous = start(folder)
        assert previous.config == RunFolder(run).load_config() == RunFolder(folder).load_config()
        assert previous.metadata == RunFolder(folder).metadata() == json.loads((run / METADATA).read_text())
        MetricsFile(folder, first_step=16)
        said = capsys.readouterr().err.splitlines()
        assert [str(folder / name) in line for line in said] == [True]


def test_a_finished_run_that_lost_its_records_ends_well_and_keeps_its_report(recorded, pretraining):
    run, _ = recorded
    folder = pretraining.folder / "no_records"
    shutil.copytree(run, folder)
    os.truncate(folder / "metrics.jsonl", 0)
    again = pretraining(folder.name, *SETTINGS)
    assert "continues at step 16 of 16" in again.out and "no losses" in again.out.splitlines()[-1]
    assert (folder / "report.md").read_bytes() == (run / "report.md").read_bytes()


def test_settings_that_a_copy_stands_for_still_bind(recorded, start, tmp_path):
    run, _ = recorded
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / CONFIG).unlink()
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        start(tmp_path / "run", seed=1)


def test_checkpoints_without_copies_are_continued_as_the_start_says(recorded, start, tmp_path, capsys):
    run, _ = recorded
    shutil.copytree(run, tmp_path / "run")
    for folder in (tmp_path / "run", *(tmp_path / "run/checkpoints").iterdir()):
        for name in (METADATA, CONFIG):
            (folder / name).unlink()
        if folder.parent.name == "checkpoints":
            renew_manifest(folder)
    assert start(tmp_path / "run", seed=1).metadata == {}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(f"{name} is gone, and no checkpoint has a copy" in "".join(said) for name in (METADATA, CONFIG)), said


_SHUTDOWN, _WITHOUT_ITS_LOG = 0x8004587D, struct.pack("I", 2)  # linux/fs.h: EXT4_IOC_SHUTDOWN, GOING_FLAGS_NOLOGFLUSH


@pytest.fixture
def disk(tmp_path):
    """An ext4 of its own, whose journal waits for a sync. Calling it cuts the power, and mounts again what is left."""
    image, folder = tmp_path / "image", tmp_path / "mounted"
    if os.geteuid() or not (shutil.which("mkfs.ext4") and shutil.which("mount")):
        pytest.skip("an image of ext4 needs root, mkfs.ext4 and mount")
    mount = ["mount", "-o", "loop,commit=300,noauto_da_alloc", image, folder]
    folder.mkdir()
    image.touch()
    os.truncate(image, 64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    if (done := subprocess.run(mount, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"no image can be mounted here: {done.stderr.strip()}")

    def cut(start: Start) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, _WITHOUT_ITS_LOG)
        except OSError as error:
            pytest.skip(f"this kernel cuts off no file system: {error}")
        finally:
            os.close(descriptor)
            start.kill()
            start.wait()
        subprocess.run(["umount", folder], check=True)
        subprocess.run(mount, check=True)

    yield folder, cut
    subprocess.run(["umount", "--lazy", folder], check=True)  # a run may still write, if the test has failed


def test_an_ext4_that_is_cut_off_while_a_run_writes(recorded, pretraining, disk):
    """Without syncs, everything but the checkpoints is empty here."""
    run, _ = recorded
    folder, cut = disk[0] / "runs/cut", disk[1]
    started = pretraining.start(folder, *SETTINGS, FAULTS_PACE=0.15)
    saved, metrics = folder / "checkpoints/step_000000008", folder / "metrics.jsonl"
    wait_until(lambda: saved.exists() and len(metrics.read_text()) >= 10, seconds=60)
    time.sleep(0.3)
    cut(started)
    assert step_of(newest_intact(folder / "checkpoints")) == 8
    for name in (METADATA, CONFIG, "metrics.jsonl"):
        assert (folder / name).stat().st_size > 100, name
    again = pretraining(folder, *SETTINGS)
    assert "continues at step 8 of 16" in again.out and " copy" not in again.err
    same_result(folder, run)
