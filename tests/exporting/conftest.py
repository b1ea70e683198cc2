"""Scorecards in this process measure latency for a moment, instead of 2 s a network."""

from functools import partial

import pytest

from maedistill.evaluation.latency import measure_latency


@pytest.fixture(autouse=True)
def short_latency(monkeypatch):
    monkeypatch.setattr("maedistill.evaluation.scorecard.measure_latency", partial(measure_latency, seconds=0.05))
