"""A signal to one process; what several ranks make of it is in tests/faults."""

import signal

import pytest

from maedistill.processes import preemption
from maedistill.processes.preemption import SIGNALS, PreemptionHandler


@pytest.fixture
def left():
    """One entry for each time that the process was told to leave at once."""
    return []


@pytest.fixture
def stop(left):
    request = PreemptionHandler(timeout_seconds=10, leave=lambda: left.append("now"))
    yield request
    request.close()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_answered_at_the_end_of_the_step(stop, number):
    assert not stop.agreed()
    signal.raise_signal(number)  # would end the process without a handler
    assert stop.agreed()
    assert stop.signal == number
    assert stop.agreed()  # a stop stays one


def test_the_handlers_of_before_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    PreemptionHandler(timeout_seconds=10, leave=lambda: None).close()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_second_ctrl_c_leaves_at_once_and_the_echo_of_a_launcher_does_not(stop, left, monkeypatch, capfd):
    now = 100.0
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now)
    signal.raise_signal(signal.SIGINT)
    now += 0.1
    signal.raise_signal(signal.SIGINT)
    assert not left and stop.agreed() == signal.SIGINT
    now += 0.9
    signal.raise_signal(signal.SIGINT)
    assert left == ["now"]
    assert capfd.readouterr().err.count("Ctrl-C") == 1


def test_ctrl_c_counts_more_than_the_sigterm_that_a_launcher_adds(stop):
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert stop.agreed() == signal.SIGINT


def test_one_notice_may_come_twice_and_a_later_repetition_ends_the_process(stop, monkeypatch):
    now = 100.0
    ended = []
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now)
    signal.raise_signal(signal.SIGUSR1)
    now += 9
    signal.raise_signal(signal.SIGUSR1)  # from the scheduler to all processes, then from the launcher to its own
    now += 60
    signal.raise_signal(signal.SIGTERM)  # another notice: time runs out
    assert signal.getsignal(signal.SIGUSR1) == signal.getsignal(signal.SIGTERM) == stop._receive

    send = signal.raise_signal
    monkeypatch.setattr(preemption.signal, "raise_signal", ended.append)
    now += 11
    stop.ignore_notices()  # all is saved, and a launcher ends the ranks that still write their last files
    send(signal.SIGTERM)
    assert not ended
    stop._is_done = False
    send(signal.SIGTERM)
    assert ended == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
