"""Two clocks: the one on the wall, and the time that this process and its children have had on their cores."""

import multiprocessing
import time

import pytest

from maedistill.benchmark import speed

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

    wall, per_core = speed.speed_of(parts())
    assert wall < 20 / 0.3 and 180 < per_core <= 200


@pytest.mark.parametrize("schedstat", [speed._SCHEDSTAT, "/nowhere/{pid}"])
def test_the_time_of_a_child_on_its_core_counts_as_ones_own(schedstat, monkeypatch):
    monkeypatch.setattr(speed, "_SCHEDSTAT", schedstat)

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

    assert 75 < speed.speed_of(parts())[1] <= 115


def test_rounds_alternate_their_order():
    order = []

    def path(name):
        order.append(name)
        return iter([0, 1])

    speeds = speed.measure({name: lambda name=name: path(name) for name in "ab"}, rounds=2)
    assert order == list("baabba") and [len(each.wall.rounds) for each in speeds.values()] == [2, 2]
