"""Who may continue a run folder, and what exit.json keeps."""

import json
import os
import subprocess
import sys

import pytest
import torch

from maedistill.commands.stage import run_command
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError
from maedistill.machine import JOBS_VARIABLE
from maedistill.report.recorded import PREDICTIONS
from maedistill.report.run_page import PAGE
from maedistill.runs.checkpoint import Snapshot, write_snapshot
from maedistill.runs.folder import RunFolder
from maedistill.runs.provenance import git_state, version_of
from maedistill.runs.records import AppendOnlyFile
from maedistill.study.plan import TEST_FILE

METADATA = {
    "stage": "pretrain",
    "input": {"mean": [0.5] * 3, "std": [0.5] * 3},
    "data": {"images": 4, "fingerprint": "f" * 64},
    "init": "timm:x of step 1",
    "teacher": "timm:t",
    "teacher_weights": ["a" * 64],
    "license": "none",
}


@pytest.fixture
def config(tmp_path):
    """Makes the config of a run in tmp_path/run with some overrides."""
    file = tmp_path / "c.yaml"
    file.write_text(f"method: mae\nrun: {tmp_path}/run\ndata: {{train: x.tar}}\n")
    return lambda *overrides: load_config(file, list(overrides), root=PretrainConfig).config


def begun(config) -> RunFolder:
    """A run folder with a checkpoint in it."""
    folder = RunFolder(config().run)
    folder.open(config(), METADATA, execution={}, fresh=False, extend=False)
    (folder.checkpoints / "step_000000001").mkdir(parents=True)
    (folder.checkpoints / "step_000000001" / "COMPLETE").touch()
    return folder


def refused(folder, config, metadata=METADATA, **how) -> str:
    with pytest.raises(ConfigError) as caught:
        folder.check(config, metadata, **({"fresh": False, "extend": False} | how))
    return f"{caught.value.cause} {caught.value.remedy}"


def test_a_config_with_keys_of_another_version_names_that_version(config):
    folder = begun(config)
    recorded = folder.path / "config.yaml"
    recorded.write_text(f"{recorded.read_text()}\nretired: 1\n")
    with pytest.raises(ConfigError) as caught:
        folder.load_config()
    (start,) = folder.metadata()["starts"]
    assert "retired" in caught.value.cause and version_of(start) in caught.value.remedy


def test_epochs_may_grow_with_extend_and_never_shrink(config):
    folder = begun(config)
    assert "--extend" in refused(folder, config("optim.epochs=200"))
    folder.check(config("optim.epochs=200"), METADATA, fresh=False, extend=True)
    assert "only adds epochs" in refused(folder, config("optim.epochs=50"), extend=True)
    assert "optim.clip: None there, 1.0 now" in refused(folder, config("optim.clip=1.0"), extend=True)


def test_a_section_that_was_dropped_is_one_change(config):
    folder = begun(lambda *more: config("decoder.width=16", "decoder.depth=1", "decoder.num_heads=2", "seed=1", *more))
    changed = refused(folder, config())
    assert "(seed: 1 there, 0 now; decoder: width=16, depth=1, num_heads=2 there, only defaults now)" in changed
    assert "decoder.depth: 1 there, 2 now" in refused(folder, config("decoder.depth=2"))


def test_a_run_that_is_extended_keeps_a_warmup_that_was_shortened(config, tmp_path, monkeypatch):
    """Here 20 of 100 epochs, the defaults, became 2 of 10; of 20 they would be 4."""
    folder, started = begun(lambda: config("optim.epochs=10")), []

    def extend(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["maedistill", "pretrain", f"{tmp_path}/c.yaml", *words, "--extend"])
        run_command(PretrainConfig, about="", examples="", start=start, dry_run=start)

    def start(config: PretrainConfig, *, extend: bool, fresh: bool = False) -> None:
        folder.check(config, METADATA, fresh=fresh, extend=extend)
        started.append(config.optim.warmup_epochs)

    extend("optim.epochs=20")
    extend("optim.epochs=200", "--dry-run")
    assert started == [2.0, 2.0]
    with pytest.raises(ConfigError, match=r"optim\.warmup_epochs: 2\.0 there, 3\.0 now"):
        extend("optim.epochs=20", "optim.warmup_epochs=3")


def test_a_run_keeps_its_teacher_and_the_record_of_what_it_began_with(config):
    folder = begun(config)
    now = METADATA | {"init": "timm:x of step 2", "teacher": "timm:t of step 2"}
    changed = refused(folder, config(), now | {"teacher_weights": ["b" * 64]})
    assert "other weights than now: timm:t of step 2" in changed and "use another run=" in changed
    RunFolder(folder.path).open(config(), now, execution={}, fresh=False, extend=False)
    assert folder.metadata()["init"] == "timm:x of step 1" and len(folder.metadata()["starts"]) == 2
    assert now["init"] == "timm:x of step 2"  # the caller's metadata is left as it was


def test_a_run_keeps_its_method_and_the_arguments_it_was_given(config):
    made = {"method_class": "page.Own", "method_arguments": {"weight": "0.1"}}
    folder = RunFolder(config().run)
    folder.open(config(), METADATA | made, execution={}, fresh=False, extend=False)
    (folder.checkpoints / "step_000000001/COMPLETE").parent.mkdir(parents=True)
    (folder.checkpoints / "step_000000001/COMPLETE").touch()
    folder.check(config(), METADATA | made, fresh=False, extend=False)
    for changed in ({"method_arguments": {"weight": "5.0"}}, {"method_arguments": {}}, {"method_class": "page.Other"}):
        assert "page.Own(weight=0.1)" in refused(folder, config(), METADATA | made | changed)
    (folder.path / "run.json").write_text(json.dumps(METADATA | {"method_class": "page.Own"}))  # of an older version
    folder.check(config(), METADATA | made, fresh=False, extend=False)


def test_a_refused_start_leaves_the_record_of_the_run_and_a_new_start_removes_it(config):
    folder = begun(config)
    with folder.recorded_end():
        pass
    record = folder.path / "exit.json"
    assert json.loads(record.read_text())["exit_code"] == 0
    other = RunFolder(folder.path)
    with pytest.raises(ConfigError), other.recorded_end():
        other.open(config("seed=1"), METADATA, execution={}, fresh=False, extend=False)
    assert json.loads(record.read_text())["exit_code"] == 0
    RunFolder(folder.path).open(config(), METADATA, execution={}, fresh=False, extend=False)
    assert not record.exists()  # a killed run must not look finished


def test_checkpoints_bind_whether_they_are_whole_or_not(config):
    """Their owner may have a copy: nothing that vouches for it may be written over."""
    folder = begun(config)
    (folder.checkpoints / "step_000000001" / "COMPLETE").unlink()
    assert "seed: 0 there, 1 now" in refused(folder, config("seed=1"))
    folder.config.unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml is gone"):
        folder.load_config()
    folder.check(config("seed=1"), METADATA, fresh=False, extend=False)  # nobody knows, and it is said
    (folder.path / "run.json").unlink()
    folder.check(config(), METADATA, fresh=False, extend=False)
    assert "run.json is gone" in refused(folder, config(), fresh=True)


@pytest.mark.parametrize("begun_by", [None, "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", JOBS_VARIABLE])
def test_a_start_that_is_refused_leaves_nothing_behind_unless_a_program_began_it(tmp_path, monkeypatch, begun_by):
    """It says why on stderr; torchrun hides its exit code, and a study's results say why a run did not begin."""
    if begun_by:
        monkeypatch.setenv(begun_by, "1")
    for name in ("new/run", "empty", "begun"):
        (tmp_path / name).mkdir() if name != "new/run" else None
        (tmp_path / name / "run.json").write_text("{}") if name == "begun" else None
        with pytest.raises(ConfigError), RunFolder(tmp_path / name).recorded_end():
            raise ConfigError("no such teacher", "name another")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    always = {"empty", "begun", "begun/run.json", "begun/exit.json"}
    assert left == always | ({"new", "new/run", "new/run/exit.json", "empty/exit.json"} if begun_by else set())


def test_a_folder_that_cannot_be_made_is_an_error_for_the_user(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    (tmp_path / "run").write_text("a file")
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot be written to"), folder.recorded_end():
        folder.open(config(), METADATA, execution={}, fresh=False, extend=False)
    assert "exit.json could not be written" in capsys.readouterr().err


def test_a_run_never_begins_in_somebodys_folder(config, tmp_path):
    (tmp_path / "run/train").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds something other than a run"):
        RunFolder(config().run).open(config(), METADATA, execution={}, fresh=False, extend=False)
    with pytest.raises(ConfigError), RunFolder(config().run).recorded_end():
        raise ConfigError("a start that failed early", "leaves nothing there")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["train"]


def test_fresh_deletes_what_a_run_writes_and_nothing_else(config):
    folder = begun(config)
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder.path / "notes.txt").write_text("mine")
    (folder.path / "export").mkdir()
    for name in (PREDICTIONS, TEST_FILE, PAGE, "scorecard.json"):  # of other commands, about this run
        (folder.path / name).write_text("{}")
    other = config("seed=1")  # other settings are no reason to keep it
    RunFolder(folder.path).open(other, METADATA | {"init": "timm:x of step 2"}, execution={}, fresh=True, extend=False)
    left = {path.name for path in folder.path.iterdir()}
    assert left == {"config.yaml", "run.json", "train.log", "lock", "notes.txt"}
    assert folder.load_config().seed == 1 and len(folder.metadata()["starts"]) == 1
    assert folder.metadata()["init"] == "timm:x of step 2"


@pytest.mark.parametrize("restarts", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_takes_for_its_own_what_its_job_has_begun(config, monkeypatch, restarts):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    folder = begun(config)
    assert not folder.was_begun_by_this_job()  # no restart: the same command a second time in a job
    saved = (folder.path / "run.json").read_text()
    (folder.path / "run.json").write_text("{")
    assert not folder.was_begun_by_this_job()  # nor does it matter what --fresh deletes
    (folder.path / "run.json").write_text(saved)
    monkeypatch.setenv(restarts, "1")
    assert folder.was_begun_by_this_job()
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # whose first start failed before it had deleted the run of job 17
    assert not folder.was_begun_by_this_job()
    RunFolder(folder.path).open(config("seed=1"), METADATA, execution={}, fresh=True, extend=False)
    assert folder.was_begun_by_this_job()


def test_fresh_spares_a_folder_in_use_and_one_that_is_no_run(config, launcher, tmp_path):
    folder = begun(config)
    before = sorted(folder.path.rglob("*"))  # this process holds the lock, so another one tries
    program = f"""
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.runs.folder import RunFolder
config = load_config({str(folder.config)!r}, root=PretrainConfig).config
RunFolder(config.run).open(config, {METADATA!r}, execution={{}}, fresh=True, extend=False)
"""
    with folder.recorded_end():
        tried = launcher.start_text(tmp_path, program).finish(1)
        assert "is in use by process" in tried.err and sorted(folder.path.rglob("*")) == before
    (folder.path / "run.json").unlink()
    with pytest.raises(ConfigError, match="cannot be trusted"):
        RunFolder(folder.path).open(config(), METADATA, execution={}, fresh=True, extend=False)
    assert folder.checkpoints.is_dir()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_permissions_that_the_umask_gives(config, umask, mode):
    before = os.umask(umask)
    try:
        folder = begun(config)
        snapshot = Snapshot(2, {"model.safetensors": {"w": torch.ones(2)}}, {"state.json": "{}"})
        write_snapshot(folder.checkpoints, snapshot, keep=2)
        lines = AppendOnlyFile(folder.path / "metrics.jsonl")
        lines.append("{}")
    finally:
        os.umask(before)
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "run.json",
        "train.log",
        "model.safetensors",
        "state.json",
        "metrics.jsonl",
    }
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: oct(mode) for path in files}


def test_the_record_of_a_start_names_versions_and_the_commit(config, tmp_path):
    start = begun(config).metadata()["starts"][0]
    assert {"time", "command", "host", "versions", "source"} <= start.keys()
    assert start["versions"].keys() >= {"maedistill", "python", "torch", "timm", "deepspeed"}
    package = tmp_path / "checkout/package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    git = ["git", "-C", str(package), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q", ".."], check=True)
    assert git_state(package) is None  # installed into somebody else's checkout
    subprocess.run([*git, "add", "__init__.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    clean = git_state(package)
    (package / "__init__.py").write_text("changed")
    assert len(clean["commit"]) == 40 and not clean["dirty"]
    assert git_state(package) == clean | {"dirty": True}
