"""Trackers: the same names and points everywhere, none twice, and no tracker that ends a run or makes it wait.

W&B and MLflow are pretended here; tests/runs/test_real_trackers.py has the real ones.
"""

import json
import os
import sys
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace as Space
from unittest.mock import Mock

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from maedistill.config import shared_rules
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError, DataError, Preempted
from maedistill.runs.metrics import MetricsFile, open_metrics
from maedistill.runs.previous import read_config
from maedistill.runs.trackers import background

NAMES = ("tensorboard", "wandb", "mlflow")
PIXELS = np.zeros((4, 6, 3), np.uint8)


class Mlflow:
    """A server with one run, and its client. fails_at: the step of which it raises; hangs: until it is set."""

    def __init__(self) -> None:
        self.points, self.pictures, self.params, self.ends, self.asked = [], [], {}, [], []
        self.fails_at, self.hangs = None, None

    def start_run(self, *, run_id: str | None, run_name: str, tags: dict) -> Space:
        assert set(tags.values()) == {""} and os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
        self.asked.append(run_id)
        newest = {tag: step for tag, step, _ in self.points}
        data = Space(_metric_objs=[Space(key=key, step=step) for key, step in newest.items()])
        return Space(info=Space(run_id="m1"), data=data)

    def log_params(self, params: dict) -> None:
        assert not self.params  # a parameter cannot be changed
        self.params = params

    def log_metrics(self, values: dict, *, step: int, synchronous: bool) -> None:
        if step == self.fails_at:
            raise ConnectionError("no answer of http://me:hunter2@tracking.example.org:5000/api\nand more")
        if self.hangs:
            self.hangs.wait()
        self.points += [(tag, step, value) for tag, value in values.items()]

    def log_image(self, pixels: np.ndarray, *, key: str, step: int, synchronous: bool) -> None:
        self.pictures.append((key, step, pixels.shape))

    def end_run(self, status: str) -> None:
        self.ends.append(status)

    def get_tracking_uri(self) -> str:
        return "http://me:hunter2@tracking.example.org:5000"


class Wandb:
    """W&B with one run."""

    Image, Settings = staticmethod(np.shape), Space

    def __init__(self) -> None:
        self.points, self.pictures, self.ends, self.asked, self.id, self.url = [], [], [], [], "w1", None

    def setup(self, settings: Space) -> None:
        assert settings == Space(silent=True)  # of a Python caller's runs too

    def init(self, *, id: str | None, resume: str, settings: Space, **_: object) -> "Wandb":
        assert settings.disable_git and settings.x_disable_meta and settings.finish_timeout == 30
        self.asked.append(id)
        return self

    def log(self, values: dict, *, step: int) -> None:
        for tag, value in values.items():
            (self.pictures if tag == "reconstruction" else self.points).append((tag, step, value))

    def finish(self, *, exit_code: int) -> None:
        self.ends.append(exit_code)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Mlflow:
    monkeypatch.setattr(os, "environ", {**os.environ, "MLFLOW_HTTP_REQUEST_TIMEOUT": "7"})
    monkeypatch.setitem(sys.modules, "mlflow", fake := Mlflow())
    return fake


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    monkeypatch.setitem(sys.modules, "wandb", fake := Wandb())
    return fake


def steps(file: MetricsFile, first: int, last: int) -> None:
    """What a run writes: a line per step, a picture every second one, kNN after the fourth."""
    for step in range(first, last + 1):
        file.write(step, {"loss": 1 / step, "lr": 0.5, "epoch": step / 2, "data_wait": 0.25, "odd": float("nan")})
        if step % 2 == 0:
            file.picture(step, "reconstruction", PIXELS)
        if step == 4:
            file.write(step, {"knn": 0.5, "epoch": 2.0})


def let_go(hangs: threading.Event) -> None:
    """Let the pretended libraries answer, and wait for the trackers' threads, which would print in the next test."""
    hangs.set()
    for thread in threading.enumerate():
        if thread.name in NAMES:
            thread.join(10)
            assert not thread.is_alive()


def test_a_continued_run_appends_the_same_points_and_pictures_to_every_tracker_and_none_twice(
    tmp_path, mlflow, wandb, capsys
) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\noptim: {lr: 0.5, betas: [0.9, 0.95]}\n")
    file = MetricsFile(tmp_path, first_step=0, trackers=(*NAMES, "mlflow"))
    steps(file, 1, 6)
    file.close("killed")
    assert json.loads((tmp_path / "trackers" / "mlflow.json").read_text()) == {
        "id": "m1",
        "pictures": {"reconstruction": 6},
    }
    file = MetricsFile(tmp_path, first_step=3, trackers=NAMES)
    steps(file, 4, 8)
    file.close()
    names = {"train/loss", "train/lr", "train/epoch", "sys/data_wait", "val/knn", "val/epoch"}
    board = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0}).Reload()
    settings = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = HParamsPluginData.FromString(settings).session_start_info.hparams
    assert start["optim.lr"].number_value == 0.5 and start["optim.betas"].string_value == "[0.9, 0.95]"
    assert board.Tags()["tensors"] == ["config/text_summary"]
    shown = {(tag, event.step): event.value for tag in board.Tags()["scalars"] for event in board.Scalars(tag)}
    assert {tag for tag, _ in shown} == names and len(shown) == 4 * 8 + 2
    for tracker in (mlflow, wandb):
        points = {(tag, step): value for tag, step, value in tracker.points}
        assert points == pytest.approx(shown) and len(tracker.points) == len(points)
        assert [picture[:2] for picture in tracker.pictures] == [("reconstruction", step) for step in (2, 4, 6, 8)]
    assert [event.step for event in board.Images("reconstruction")] == [2, 4, 6, 8]
    assert mlflow.asked == [None, "m1"] and wandb.asked == [None, "w1"]  # named twice is opened once
    assert mlflow.ends == ["KILLED", "FINISHED"] and wandb.ends == [1, 0]
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"  # the user's counts
    assert mlflow.params == {"seed": 0, "optim.lr": 0.5, "optim.betas": "[0.9, 0.95]"}
    printed = "".join(capsys.readouterr())
    assert "m1 at http://***@tracking.example.org:5000" in printed and "hunter2" not in printed


def test_a_tracker_that_fails_costs_a_warning_and_gets_what_it_lacks_when_the_run_continues(
    tmp_path, mlflow, wandb, capsys
) -> None:
    mlflow.fails_at = 3
    file = MetricsFile(tmp_path, first_step=0, trackers=("mlflow", "wandb"))
    steps(file, 1, 6)
    file.close()
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert "mlflow" in warning and "ConnectionError" in warning and "hunter2" not in warning
    assert {step for _, step, _ in mlflow.points} == {1, 2} and mlflow.ends == []
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7 and wandb.ends == [0]
    mlflow.fails_at = None
    MetricsFile(tmp_path, first_step=6, trackers=("mlflow",)).close()
    assert sorted(mlflow.points) == sorted(wandb.points) and len(mlflow.points) == 4 * 6 + 2


def test_a_full_disk_here_keeps_nothing_from_a_server_and_is_said_once(tmp_path, mlflow, monkeypatch, capsys) -> None:
    monkeypatch.setattr(background, "write_text", Mock(side_effect=DataError("a full disk", "free some")))
    file = MetricsFile(tmp_path, first_step=0, trackers=("mlflow",))
    steps(file, 1, 4)
    file.close()
    assert len(mlflow.points) == 4 * 4 + 2 and len(mlflow.pictures) == 2 and mlflow.ends == ["FINISHED"]
    assert capsys.readouterr().err.count("a full disk") == 1


def test_a_tracker_that_hangs_makes_nobody_wait_for_long(tmp_path, mlflow, monkeypatch, capsys) -> None:
    mlflow.hangs = threading.Event()
    for name, value in {"_START_SECONDS": 0.1, "_MOST_WAITING": 5}.items():
        monkeypatch.setattr(background, name, value)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')  # it hangs over these already
    began = time.monotonic()
    for count, words in ((2, "in time"), (20, "5 of them wait")):
        file = MetricsFile(tmp_path, first_step=1, trackers=("mlflow",))
        steps(file, 2, 1 + count)
        file.close(patience=0.3)
        (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
        assert words in warning
    assert time.monotonic() - began < 20  # by default each of the two would wait 10 s to begin and 30 s to end
    let_go(mlflow.hangs)


@pytest.mark.parametrize(
    ("error", "status"), [(Preempted("SIGTERM", 3), "KILLED"), (KeyboardInterrupt(), "KILLED"), (OSError(), "FAILED")]
)
def test_trackers_are_told_how_a_run_ended_even_if_its_lines_are_lost(
    tmp_path, mlflow, monkeypatch, error, status
) -> None:
    config = Space(log=Space(every_steps=1, trackers=("mlflow",)))
    with pytest.raises(type(error)), open_metrics(tmp_path, config, first_step=0, closing=nullcontext) as metrics:
        monkeypatch.setattr(metrics.lines, "close", Mock(side_effect=DataError("a full disk", "free some")))
        raise error
    assert mlflow.ends == [status]


def test_a_tracker_whose_import_or_opening_fails_or_hangs_is_left_out_and_all_share_the_wait_for_it(
    tmp_path, monkeypatch, capsys
) -> None:
    (tmp_path / "mlflow.py").write_text("raise TypeError('of another numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    hangs = threading.Event()
    monkeypatch.setattr(background, "_START_SECONDS", 2.0)
    monkeypatch.setattr(background, "OPENERS", dict.fromkeys(NAMES, lambda opening: hangs.wait()))
    import torch.utils.tensorboard  # noqa: F401  its import is not the wait

    began = time.monotonic()
    file = MetricsFile(tmp_path, first_step=0, trackers=NAMES)
    assert 2 <= time.monotonic() - began < 3.9 and len(file.trackers) == 2, "one after the other they would take 4 s"
    (warning,) = capsys.readouterr().err.splitlines()
    assert "mlflow" in warning and "TypeError" in warning and "pip" not in warning
    let_go(hangs)


def test_a_missing_package_is_an_error_before_the_run_but_tensorboard_a_line(tmp_path, monkeypatch, capsys) -> None:
    def load(*settings: str) -> PretrainConfig:
        return load_config("quickstart/mae", ["run=r", "data.train=x.tar", *settings], root=PretrainConfig).config

    (tmp_path / "run.json").write_text('{"stage": "pretrain"}')  # of a machine that has them
    (tmp_path / "config.yaml").write_text(
        "run: r\nmethod: mae\ndata: {train: x.tar}\nlog: {trackers: [wandb, mlflow]}\n"
    )
    folder = Space(origin=None)  # W&B's folder `wandb`, which a program that starts there could import
    monkeypatch.setattr(shared_rules, "find_spec", lambda name: folder if name == "wandb" else None)
    assert load().log.trackers == ("tensorboard",)
    for name in ("wandb", "mlflow"):
        with pytest.raises(ConfigError) as found:
            load(f"log.trackers=[tensorboard, {name}]")
        assert f"log.trackers=[tensorboard, {name}]" in found.value.cause
        assert f"pip install 'maedistill[{name}]'" in found.value.remedy
    assert read_config(tmp_path).log.trackers == ("wandb", "mlflow")
    monkeypatch.setattr(shared_rules, "find_spec", lambda name: Space(origin="x") if name == "mlflow" else None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):  # mlflow-skinny
        load("log.trackers=[mlflow]")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert load("log.trackers=[mlflow]").log.trackers == ("mlflow",)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    MetricsFile(tmp_path, first_step=0, trackers=("tensorboard",)).close()
    assert capsys.readouterr().out.count("pip install 'maedistill[tensorboard]'") == 1
