"""How long a run waits for data, on a GPU's own time line too; and the hint about it, said once, when it is due."""

import itertools

import pytest
import torch

from maedistill.runs import clock as clock_module
from maedistill.runs.clock import Clock, DataWaitHint


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
