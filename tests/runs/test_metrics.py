"""How long a run waits for data, on a GPU's own time line too; and the hint about it, said once, when it is due."""

import itertools
import json
import os

import pytest
import torch

from maedistill.runs import clock as clock_module
from maedistill.runs import metrics
from maedistill.runs.clock import Clock, DataWaitHint
from maedistill.runs.history import read_metrics
from maedistill.runs.metrics import Averages


class Card:
    """A GPU that works through a queue, and a host's clock: seconds, both moved by hand."""

    def __init__(self) -> None:
        self.host = self.free = 0.0  # now; when the GPU will have done all that was queued

    def queue(self, seconds: float) -> None:
        self.free = max(self.free, self.host) + seconds

    def event(self, *, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, card: Card) -> None:
        self.card = card

    def record(self) -> None:
        self.at = max(self.card.host, self.card.free)

    def query(self) -> bool:
        return self.at <= self.card.host

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.at - self.at)


@pytest.mark.parametrize(("loading", "share"), [(0.2, 0.0), (0.9, 0.0), (1.25, 0.2), (2.0, 0.5)])
def test_a_gpu_waits_for_data_only_while_it_has_nothing_to_do(loading, share, monkeypatch) -> None:
    card = Card()
    monkeypatch.setattr(torch.cuda, "Event", card.event)
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: card.host)
    clock = Clock(torch.device("cuda"))
    card.queue(1.0)  # the micro-batch before
    for _ in range(100):
        with clock.waiting():
            card.host += loading  # the host is blocked, whatever the GPU does
        card.queue(1.0)
        card.host = max(card.host, card.free - 1.0)  # never more than one step ahead
        clock.images += 8
    card.host = card.free  # as when losses are read
    rate, waited, seconds = clock.read()
    assert waited == pytest.approx(share, abs=0.02)
    assert rate == pytest.approx(8 / max(loading, 1.0), rel=0.02)
    assert seconds == pytest.approx(card.host)


def test_the_hint_comes_once_after_three_slow_intervals_in_a_row_the_first_one_left_out() -> None:
    slow, fast = 0.06, 0.05  # 5 % are borne
    for shares in itertools.product((slow, fast), repeat=8):
        hint = DataWaitHint()
        said = [i for i, share in enumerate(shares) if hint.note(share, workers=2)]
        due = [i for i in range(3, 8) if shares[i - 2 : i + 1] == (slow,) * 3]
        assert said == due[:1]


def test_the_hint_names_what_is_set_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, is_named in ((None, True), (object(), False)):
        monkeypatch.setattr(clock_module, "find_spec", lambda name, spec=spec: spec)
        hint = DataWaitHint()
        said = [hint.note(0.31, workers=7) for _ in range(4)][-1]
        assert "31%" in said and "data.workers, now 7" in said and "--shorter-side" in said
        assert ("pip install simplejpeg" in said) == is_named


def test_means_go_on_over_a_restart_exactly() -> None:
    values = [torch.tensor(value, dtype=torch.float32) for value in (1 / 3, 1e3 / 7, torch.nan, 1e-3 / 3, 2 / 7)]
    whole, first, second = Averages(), Averages(), Averages()
    for value in values:
        whole.add({"loss": value})
    for value in values[:3]:
        first.add({"loss": value})
    second.restore(json.loads(json.dumps(first.totals())), device=torch.device("cpu"))
    for value in values[3:]:
        second.add({"loss": value})
    assert second.read() == whole.read() and second.read() == {}


def test_objects_that_belong_together_are_written_in_one_piece(tmp_path, monkeypatch) -> None:
    file, pieces, write = metrics.MetricsFile(tmp_path, first_step=0), [], os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: pieces.append(data) or write(descriptor, data))
    file.write(3, {"top1": 0.5}, {"exit0_top1": float("nan")})
    assert len(pieces) == 1 and pieces[0] == b'{"step": 3, "top1": 0.5}\n{"step": 3, "exit0_top1": null}\n'
    file.close()


def test_tensorboard_has_groups_and_the_settings(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (tmp_path / "config.yaml").write_text("seed: 0\noptim: {lr: 0.5, betas: [0.9, 0.95]}\n")
    file = metrics.MetricsFile(tmp_path, first_step=0, trackers=("tensorboard",))
    file.write(1, {"loss": 1.0, "lr": 0.1, "images_per_second": 5.0, "epoch": 0.5})
    file.write(1, {"knn": 0.5, "epoch": 0.5})
    file.close()
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    settings, events = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content, board.Tags()
    start = HParamsPluginData.FromString(settings).session_start_info.hparams
    assert start["seed"].number_value == 0 and start["optim.lr"].number_value == 0.5
    assert start["optim.betas"].string_value == "[0.9, 0.95]"
    names = {"train/loss", "train/lr", "train/epoch", "sys/images_per_second", "val/knn", "val/epoch"}
    assert set(events["scalars"]) == names and events["tensors"] == ["config/text_summary"]
    assert [set(record) for record in read_metrics(tmp_path)][1] == {"step", "knn", "epoch"}  # flat as ever


@pytest.mark.parametrize(
    ("steps", "first_step", "warns"), [([2, 4, 6], 12, True), ([2, 4, 10], 11, False), ([], 3, True)]
)
def test_records_that_are_missing_before_a_checkpoint_are_said(tmp_path, capsys, steps, first_step, warns):
    """A file that was cut between two lines looks whole; what tells is the distance from its last line."""
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in steps))
    metrics.MetricsFile(tmp_path, first_step=first_step).close()
    assert ("may be missing" in capsys.readouterr().err) == warns
