"""Loader workers that die, hang or stop, with real processes: an error that names the sample, and nobody left."""

import gc
import math
import multiprocessing
import os
import re
import signal
import struct
import time
from dataclasses import replace
from multiprocessing.popen_fork import Popen

import pytest
import torch

from maedistill.data.loading import workers
from maedistill.data.loading.evaluation import EvaluationImages, exact_batches
from maedistill.data.loading.loader import training_batches
from maedistill.data.remote.cache import ShardCache
from maedistill.data.remote.download import RetryPolicy
from maedistill.data.shards.open_index import open_index
from maedistill.errors import DataError, PeerError
from tests.data.crops import crops_of, failure, one_rank
from tests.support.forked import exit_code, fork
from tests.support.waiting import lives, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # torch's own threads
VICTIM = 29  # a position in the third batch of twelve
TIMEOUT = 3.0  # seconds
SOON = 60  # seconds, on a machine that has other things to do; an idle one takes five


def batches_of(crops, *, workers=2, steps=8, timeout_seconds=TIMEOUT, max_batch_wait=math.inf):
    """Micro-batches of 12."""
    limits = {"timeout_seconds": timeout_seconds, "max_batch_wait": max_batch_wait}
    return training_batches(crops, 0, steps, workers=workers, **limits, **one_rank(12))


@pytest.fixture
def index(shards):
    return open_index(str(shards / "train-*.tar"))


@pytest.fixture
def victim(index):
    """The name of the sample at the position VICTIM."""
    return index.sample_name(int(crops_of(index).order.samples(torch.tensor([VICTIM]))))


@pytest.fixture(autouse=True)
def nobody_is_left():
    before = multiprocessing.active_children()
    yield
    gc.collect()
    assert multiprocessing.active_children() == before
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


def at_victim(act):
    """An augmentation that acts at one position."""

    def augment(crop, position):
        if position == VICTIM:
            act()
        return crop

    return augment


def assert_matches(pattern, text):
    assert re.search(pattern, text), text


DEATHS = {
    "out of memory": (lambda: os.kill(os.getpid(), signal.SIGKILL), r"signal 9 \(Killed\)", "memory"),
    "mapped file cut": (lambda: os.kill(os.getpid(), signal.SIGBUS), r"signal 7 \(Bus error\)", "mapped into memory"),
    "decoder crashes": (
        lambda: os.kill(os.getpid(), signal.SIGSEGV),
        r"signal 11 \(Segmentation fault\)",
        "look at that sample",
    ),
    "process leaves": (lambda: os._exit(3), "ended with exit code 3", "look at"),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_worker_that_dies_is_an_error_that_names_its_sample(index, victim, death):
    act, said, remedy = DEATHS[death]
    error, count, seconds = failure(batches_of(crops_of(index, augment=at_victim(act)), timeout_seconds=300))
    assert isinstance(error, PeerError) and count <= 2 and seconds < SOON
    pattern = rf"a loader worker \(process \d+\) .*{said}, at {victim}$"
    assert_matches(pattern, error.cause)
    assert remedy in error.remedy and error.__cause__ is None and error.__context__ is None


HANGS = {"sleeps": lambda: time.sleep(1e6), "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP)}


@pytest.mark.parametrize(("hang", "workers"), [("sleeps", 2), ("is stopped", 1)])
def test_a_worker_that_hangs_is_an_error_that_names_its_sample(index, victim, hang, workers):
    crops = crops_of(index, augment=at_victim(HANGS[hang]))
    error, count, seconds = failure(batches_of(crops, workers=workers))
    # a stopped worker does not even hand over what it has made
    assert isinstance(error, DataError) and (count == 2 or hang == "is stopped") and seconds < SOON
    assert_matches(rf"1 of {workers} loader workers have not moved for \S+ s: process \d+ is at {victim}$", error.cause)


def test_a_worker_that_is_stopped_between_two_samples_is_named_too(index):
    batches = batches_of(crops_of(index), workers=1, steps=20)
    next(batches)
    time.sleep(1)  # 0.1 s is enough for the 48 crops that it makes ahead; then it waits
    worker = multiprocessing.active_children()[0].pid
    os.kill(worker, signal.SIGSTOP)
    error, _, seconds = failure(batches)
    assert isinstance(error, PeerError) and seconds < SOON
    assert_matches(rf"no loader worker is at a sample: process {worker} is stopped$", error.cause)


def test_a_wait_ends_before_the_other_ranks_give_up(index, victim):
    """The limit of all waiting holds where the limit of the workers is longer."""
    crops = crops_of(index, augment=at_victim(HANGS["sleeps"]))
    error, _, seconds = failure(batches_of(crops, workers=1, timeout_seconds=10 * SOON, max_batch_wait=TIMEOUT))
    assert isinstance(error, DataError) and seconds < SOON and victim in error.cause


def test_a_read_that_never_returns_is_named_by_shard_in_evaluation_too(index, tmp_path):
    """A pipe that nobody writes to holds whoever opens it, as a dead network drive does."""
    pipe = tmp_path / "dead.tar"
    os.mkfifo(pipe)
    dead = replace(index, shards=(str(pipe), *index.shards[1:]))
    images = EvaluationImages(dead, torch.arange(20, 60), lambda image: torch.zeros(3, 2, 2, dtype=torch.uint8))
    error, count, seconds = failure(exact_batches(images, batch=2, workers=2, timeout_seconds=TIMEOUT))
    assert isinstance(error, DataError) and count == 0 and seconds < SOON
    assert "2 of 2 loader workers" in error.cause and f"is at {dead.sample_name(20)}; process " in error.cause


def test_slow_samples_are_no_hang(index):
    """A batch takes longer than the time-out, a sample does not."""

    def augment(crop, _):
        time.sleep(TIMEOUT / 8)
        return crop

    began = time.monotonic()
    assert len(list(batches_of(crops_of(index, augment=augment), workers=1, steps=1))) == 1
    assert time.monotonic() - began > 1.4 * TIMEOUT


@pytest.mark.parametrize("longest", [60.0, 0.5])
def test_a_shard_that_is_on_its_way_has_a_time_limit_of_its_own(index, longest, monkeypatch):
    """The first takes twice the time-out to come."""
    paths, came = dict(enumerate(index.shards)), []
    remote = replace(index, shards=tuple(f"http://h/{number}.tar" for number in paths))

    def fetch(cache, shard):
        if not came:
            time.sleep(2 * TIMEOUT)
        came.append(shard)
        return os.open(paths[int(shard.url[9:-4])], os.O_RDONLY)

    monkeypatch.setattr(ShardCache, "open", fetch)
    monkeypatch.setattr("maedistill.data.shards.reader.ReadAhead.want", lambda *_: None)
    monkeypatch.setattr(RetryPolicy.__init__, "__defaults__", (6, 30.0, 1.0, longest))
    few = batches_of(crops_of(remote), workers=1, steps=1)
    if longest > TIMEOUT:
        assert len(next(few).images) == 12
    else:
        error, _, seconds = failure(few)
        assert_matches(r"process \d+ waits for the shard of http://h/\d.tar:", error.cause)
        assert seconds < SOON


@pytest.mark.parametrize("starting", [False, True], ids=["at work", "starting"])
def test_workers_leave_signals_to_the_training_process(index, monkeypatch, starting):
    """SIGTERM and SIGUSR1 come to all processes of a group; a training process that answers them needs its workers."""
    if starting:  # torch's own handler, which a worker has before ours, ends it on a SIGTERM from its parent
        detach = workers.detach_worker
        monkeypatch.setattr(workers, "detach_worker", lambda: (time.sleep(1), detach()))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        batches = batches_of(crops_of(index), workers=2, timeout_seconds=300)
        done = 0 if starting else len([next(batches)])
        time.sleep(0.5)  # both have torch's handlers
        for worker in multiprocessing.active_children():
            for number in numbers:
                os.kill(worker.pid, number)
        assert sum(1 for _ in batches) == 8 - done
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_batches_that_are_left_behind_leave_no_worker_not_even_a_hung_one(index):
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        batches = batches_of(crops_of(index, augment=at_victim(HANGS["sleeps"])))
        next(batches)
        time.sleep(0.5)
        assert len(multiprocessing.active_children()) == 2
        began = time.monotonic()
        del batches
        assert not multiprocessing.active_children() and time.monotonic() - began < SOON
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_worker_that_no_signal_ends_keeps_nobody(index, monkeypatch):
    """A process that waits for a dead disk does not even answer SIGKILL; here it is spared."""
    monkeypatch.setattr(Popen, "_send_signal", lambda *_: None)
    monkeypatch.setattr("maedistill.data.loading.watchdog._END", 0.1)
    batches = batches_of(crops_of(index, augment=at_victim(HANGS["sleeps"])), workers=1)
    pid = multiprocessing.active_children()[-1].pid
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    try:
        error, count, _ = failure(batches)
        assert isinstance(error, DataError) and count == 2 and not multiprocessing.active_children()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_workers_of_a_killed_process_vanish_hung_or_not(index):
    """One worker hangs, the other waits for work."""
    receiver, sender = os.pipe()

    def load():
        batches = batches_of(crops_of(index, augment=at_victim(HANGS["sleeps"])), timeout_seconds=60)
        next(batches), next(batches)
        os.write(sender, struct.pack("2i", *(worker.pid for worker in multiprocessing.active_children()[-2:])))
        time.sleep(60)

    parent = fork(load)
    os.close(sender)
    workers = struct.unpack("2i", os.read(receiver, 8))
    os.close(receiver)
    assert all(map(lives, workers))
    os.kill(parent, signal.SIGKILL)
    assert exit_code(parent) == -signal.SIGKILL
    wait_until(lambda: not any(map(lives, workers)), seconds=SOON)


LEAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
from maedistill.data.shards.open_index import open_index
from maedistill.data.loading.loader import RandomCrops
from maedistill.data.loading.order import SampleOrder
from maedistill.data.loading.workers import load_batches

index = open_index(sys.argv[1])
hang = lambda crop, position: time.sleep(1e6) if position > 20 else crop
crops = RandomCrops(index, SampleOrder(index.starts, seed=5), seed=5, size=16, scale=(1, 1), ratio=(1, 1), augment=hang)
batches = load_batches(crops, [[*range(12 * i, 12 * i + 12)] for i in range(8)], workers=2)
next(batches)
print(time.time(), flush=True)
raise AssertionError("a bug elsewhere")
"""


def test_a_process_that_fails_for_another_reason_ends_though_a_worker_hangs(shards, launcher, tmp_path):
    """Python waits for children at exit; the batches are alive till then, in the traceback of an uncaught error."""
    ended = launcher.start_text(tmp_path, LEAVES, shards / "train-*.tar").finish(1)
    assert "a bug elsewhere" in ended.err
    assert time.time() - float(ended.out) < SOON


def test_a_disk_error_names_the_sample(index, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("maedistill.data.shards.reader.os.pread", broken)
    error, count, _ = failure(batches_of(crops_of(index), workers=1))
    assert isinstance(error, DataError) and count == 0
    assert_matches(r"train-00000\d.tar:\S+ cannot be read: Input/output error", error.cause)
