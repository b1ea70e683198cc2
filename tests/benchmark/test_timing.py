"""Two clocks: the one on the wall, and the time that this process and its children have had on their cores."""

import multiprocessing
import time

import pytest
import torch

from maedistill.benchmark import timing
from maedistill.benchmark.timing import interleave, measure, ratio, repeated, spread

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # torch's own threads


def spin(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_neither_clock_counts_the_warm_up_or_what_follows_the_last_part():
    def parts():
        for idle, busy, count in [(0.2, 0.2, 1000), (0.1, 0.05, 10), (0.1, 0.05, 10)]:
            time.sleep(idle)
            spin(busy)
            yield count
        spin(0.2)

    wall, per_core = measure(parts())
    assert wall < 20 / 0.3 and 180 < per_core <= 200


def test_the_core_seconds_of_a_child_count_too():
    def parts():
        context = multiprocessing.get_context("fork")
        ready, done = context.Event(), context.Event()
        child = context.Process(target=lambda: (ready.wait(), spin(0.2), done.set(), time.sleep(60)))
        child.start()
        yield 0
        ready.set()
        done.wait()
        yield 20
        child.kill()
        child.join()

    assert 75 < measure(parts())[1] <= 115


def test_rounds_alternate_their_order():
    order = []

    def path(name):
        order.append(name)
        return iter([0, 1])

    rates = interleave({name: lambda name=name: path(name) for name in "ab"}, rounds=2)
    assert order == list("baabba") and [len(rate.wall) for rate in rates.values()] == [2, 2]


def test_a_repeated_path_runs_for_the_seconds_asked(monkeypatch):
    calls = []

    def clocked(work, device, *, repeats=1):
        for _ in range(repeats):
            work()
        return 0.03 * repeats

    monkeypatch.setattr(timing, "seconds_of", clocked)
    path = repeated(lambda: calls.append(0), torch.device("cpu"), images=3, seconds=0.1)
    before = len(calls)
    assert list(path()) == [0, 3 * 4] and len(calls) - before == 4  # 0.1 / 0.03, rounded up


def test_ratios_are_taken_within_a_round():
    assert str(spread([1.0, 2.0, 3.0])) == "2 (1.5 to 2.5)"
    assert ratio([10.0, 200.0, 30.0], [5.0, 100.0, 10.0]) == spread([2.0, 2.0, 3.0])
