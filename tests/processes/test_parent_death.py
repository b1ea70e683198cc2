"""Processes end with the one that they work for: ranks with their launcher, loader workers with their rank."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from tests.support.waiting import lives

# A launcher that starts a rank and says its number; the rank says when it is ready.
LAUNCHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline(), end="", flush=True)
time.sleep(60)
"""
RANK = "import time; from maedistill.processes.parent_death import die_with_launcher; die_with_launcher()\n"
RANK += "print('ready', flush=True); time.sleep(60)"
# A rank that answers SIGTERM itself forks a worker: it must leave SIGTERM to the rank and outlive no rank.
WORKER = """
import multiprocessing, os, signal, sys, time
from maedistill.processes.parent_death import detach_worker
def work(ready):
    detach_worker()
    for number in signal.SIGTERM, signal.SIGUSR1, signal.SIGINT:
        signal.raise_signal(number)
    ready.set()
    time.sleep(60)
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGUSR1, lambda *_: None)
fork = multiprocessing.get_context("fork")
ready = fork.Event()
worker = fork.Process(target=work, args=(ready,))
worker.start()
ready.wait()
print(worker.pid, "ready", flush=True)
time.sleep(60)
"""


def start(*command, **variables):
    """Start a process; return it and the number of the one that it started, which is ready."""
    outside = {k: v for k, v in os.environ.items() if k not in ("TORCHELASTIC_RUN_ID", "CROSS_RANK")}
    process = subprocess.Popen(
        [sys.executable, "-c", *command], env=outside | variables, stdout=subprocess.PIPE, text=True
    )
    number, word = process.stdout.readline().split()
    assert word == "ready"
    return process, int(number)


def lives_on(number, seconds):
    """Return whether a process is still there after `seconds`; at once when it is not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not lives(number):
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("variables", [{"TORCHELASTIC_RUN_ID": "1"}, {"CROSS_RANK": "0"}, {}])
def test_a_rank_ends_with_its_launcher_and_lives_on_without_one(variables):
    launcher, rank = start(LAUNCHER, RANK, **variables)
    launcher.kill()
    launcher.communicate()
    try:
        assert lives_on(rank, 20 if variables else 1) == (not variables)
    finally:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def test_a_worker_leaves_signals_to_its_rank_and_ends_with_it():
    rank, worker = start(WORKER)
    assert lives_on(worker, 0.2)
    rank.kill()
    rank.communicate()
    assert not lives_on(worker, 20)


def test_a_worker_of_a_process_that_does_not_answer_sigterm_ends_by_it():
    plain = "\n".join(line for line in WORKER.splitlines() if not line.startswith("signal.signal("))
    plain = plain.replace("for number in signal.SIGTERM, signal.SIGUSR1, signal.SIGINT", "for number in ()")
    rank, worker = start(plain)
    try:
        os.kill(worker, signal.SIGTERM)
        assert not lives_on(worker, 20)
    finally:
        rank.kill()
        rank.communicate()
