"""Averages over steps, metrics.jsonl, and what TensorBoard gets of it."""

import json
import os

import pytest
import torch

from maedistill.runs import metrics
from maedistill.runs.metrics import Averages


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


def test_a_term_that_only_some_ranks_have_counts_where_it_is(monkeypatch) -> None:
    """Ranks whose reductions differ in length would hang, and those in another order would mix up their terms."""
    ranks, sent = [Averages(), Averages()], []
    ranks[0].add({"loss": torch.tensor(1.0), "a": torch.tensor(3.0), "b": torch.tensor(5.0)})
    ranks[1].add({"loss": torch.tensor(2.0), "b": torch.tensor(7.0)})
    ranks[1].add({"c": torch.tensor(9.0), "b": torch.tensor(8.0), "loss": torch.tensor(6.0)})
    monkeypatch.setattr(metrics.distributed, "gather_objects", lambda _: [list(one.sums) for one in ranks])
    monkeypatch.setattr(metrics.distributed, "all_reduce_sum", lambda values: sent.append(values) or values)
    for one in ranks:
        one.totals()
    assert list(sent[0]) == list(sent[1])
    sums = {name: float(value + sent[1][name]) for name, value in sent[0].items()}
    monkeypatch.setattr(metrics.distributed, "all_reduce_sum", lambda _: sums)
    assert ranks[0].read() == {"loss": 3.0, "a": 3.0, "b": 20 / 3, "c": 9.0}


def test_objects_that_belong_together_are_written_in_one_piece(tmp_path, monkeypatch) -> None:
    file, pieces, write = metrics.MetricsFile(tmp_path, first_step=0), [], os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: pieces.append(data) or write(descriptor, data))
    file.write(3, {"top1": 0.5}, {"exit0_top1": float("nan")})
    assert len(pieces) == 1 and pieces[0] == b'{"step": 3, "top1": 0.5}\n{"step": 3, "exit0_top1": null}\n'
    file.close()


@pytest.mark.parametrize(
    ("steps", "first_step", "warns"),
    [([2, 4, 6], 12, True), ([2, 4, 10], 11, False), ([], 3, True), ([], 1, False), ([2], 3, False)],
)
def test_records_that_are_missing_before_a_checkpoint_are_said(tmp_path, capsys, steps, first_step, warns):
    """A file that was cut between two lines looks whole; what tells is the distance from its last line."""
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in steps))
    metrics.MetricsFile(tmp_path, first_step=first_step, every=2).close()
    assert ("may be missing" in capsys.readouterr().err) == warns
