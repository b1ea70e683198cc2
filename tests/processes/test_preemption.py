"""A signal to one process; what several ranks make of it is in tests/faults."""

import signal

import pytest

from maedistill.processes import preemption as interrupt
from maedistill.processes.preemption import SIGNALS, PreemptionHandler


@pytest.fixture
def stop():
    request = PreemptionHandler(timeout_seconds=10)
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
    before = [signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)]
    request = PreemptionHandler(timeout_seconds=10)
    assert signal.getsignal(signal.SIGINT) is before[-1]  # Ctrl-C is nothing of ours
    request.close()
    assert [signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)] == before


def test_one_notice_may_come_twice_and_a_later_repetition_ends_the_process(stop, monkeypatch):
    now = 100.0
    ended = []
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now)
    signal.raise_signal(signal.SIGUSR1)
    now += 9
    signal.raise_signal(signal.SIGUSR1)  # from the scheduler to all processes, then from the launcher to its own
    now += 60
    signal.raise_signal(signal.SIGTERM)  # another notice: time runs out
    assert signal.getsignal(signal.SIGUSR1) == signal.getsignal(signal.SIGTERM) == stop._receive

    send = signal.raise_signal
    monkeypatch.setattr(interrupt.signal, "raise_signal", ended.append)
    now += 11
    send(signal.SIGTERM)
    assert ended == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
