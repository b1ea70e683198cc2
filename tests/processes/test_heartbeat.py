"""Which rank a diagnosis names, and the watch on one process. Real ranks are in tests/faults."""

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from maedistill.errors import ConfigError, DataError, NumericsError, PeerError
from maedistill.processes import heartbeat
from maedistill.processes.diagnosis import (
    Diagnosis,
    Heartbeat,
    diagnose,
    failure_of,
    find_lost,
    peer_error,
    peer_errors,
    pid_space,
)
from maedistill.processes.heartbeat import RankWatch
from tests.support.waiting import wait_until

# Four ranks that were just seen to live: after ten steps of two moves each, waiting for each other.
BEFORE = [
    Heartbeat(rank, f"node{rank // 2}", 100 + rank, rounds=50, moves=20, step=10, place="engine.py:7 step", waits=True)
    for rank in range(4)
]
AFTER = [replace(beat, rounds=54) for beat in BEFORE]


def diagnosed(after, before=BEFORE):
    return diagnose(before, after, why="no step for 60 s")


def changed(rank, **values):
    return [replace(beat, **values) if beat.rank == rank else beat for beat in AFTER]


def test_silent_ranks_are_lost():
    after = [AFTER[0], BEFORE[1], AFTER[2], BEFORE[3]]
    after[0] = replace(after[0], moves=1)  # who is behind does not matter then
    diagnosis = diagnosed(after)
    assert diagnosis.lost == (1, 3)
    assert diagnosis.error.cause == (
        "rank 1 on node0 (process 101, step 10), rank 3 on node1 (process 103, step 10) ended, froze or cannot be "
        "reached"
    )


def test_the_rank_that_moved_least_is_named_though_it_too_seems_to_wait():
    diagnosis = diagnosed(changed(2, moves=19, place="loader.py:5 next"))
    assert diagnosis.lost == ()
    assert diagnosis.error.cause == (
        "no step for 60 s: rank 2 on node1 (process 102, step 10) is in loader.py:5 next; the others wait"
    )
    assert "engine.timeout_seconds" in diagnosis.error.remedy


def test_among_equals_it_is_the_one_that_does_not_wait():
    cause = diagnosed(changed(3, waits=False, place="teacher.py:9 forward")).error.cause
    assert cause.endswith(": rank 3 on node1 (process 103, step 10) is in teacher.py:9 forward; the others wait")


def test_where_all_wait_all_are_named():
    cause = diagnosed(AFTER).error.cause
    assert all(f"rank {rank} on" in cause for rank in range(4))
    assert "others" not in cause


HERE = pid_space()


def lost(beats, silent):
    seconds = {beat.rank: silent.get(beat.rank, 0.3) for beat in beats}
    diagnosis = find_lost(beats, seconds, pid_space=HERE)
    return None if diagnosis is None else diagnosis.lost


def test_a_rank_of_this_machine_is_gone_when_its_process_is_and_not_while_it_is_frozen():
    dead, frozen = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    try:
        frozen.send_signal(signal.SIGSTOP)
        dead.kill()
        while "Z" not in Path(f"/proc/{dead.pid}/stat").read_text().split():
            time.sleep(0.01)  # a zombie, as its launcher does not look yet
        beats = [replace(beat, pid_space=HERE, process=os.getpid()) for beat in AFTER]
        beats[1], beats[2] = replace(beats[1], process=dead.pid), replace(beats[2], process=frozen.pid)
        assert lost(beats, {}) is None
        assert lost(beats, {1: 8, 2: 300}) == (1,)
        dead.wait()
        assert lost(beats, {1: 8, 2: 300}) == (1,)
        assert lost([replace(beats[1], left=True), *beats[2:]], {1: 8}) is None
    finally:
        for process in (dead, frozen):
            process.kill()
            process.wait()


def test_a_rank_of_another_machine_is_gone_when_the_whole_machine_is_silent():
    beats = [replace(beat, pid_space=HERE if beat.rank < 2 else "other") for beat in AFTER]
    assert lost(beats, {2: 300}) is None  # its neighbour would have said that it is gone
    assert lost(beats, {2: 300, 3: 50}) is None
    assert lost(beats, {2: 300, 3: 61}) == (2, 3)


def test_a_rank_that_left_normally_is_never_named():
    after = changed(1, rounds=50, moves=1, left=True)
    assert "rank 1 on" not in diagnosed(after).error.cause


@pytest.mark.parametrize("kind", [ConfigError, DataError, NumericsError, PeerError])
def test_an_error_reaches_the_other_ranks_as_what_it_was(kind):
    told = failure_of(BEFORE[1], kind("a cause", "a remedy"))
    heard = Diagnosis.from_text(told.to_text())
    assert type(heard.error) is kind
    assert (heard.error.cause, heard.error.remedy, heard.lost) == ("rank 1 on node0: a cause", "a remedy", ())


def test_a_bug_reaches_the_other_ranks_by_name():
    error = failure_of(BEFORE[1], KeyError("x")).error
    assert (type(error), error.cause) == (PeerError, "rank 1 on node0 failed: KeyError: 'x'")


@pytest.mark.parametrize("key", ["beat/0", "failed"])
@pytest.mark.parametrize("said", ["", "[", "3", "[1, 2]", "[3, null, 1, 5]", '{"rank": 0, "more": 1}', b"\xff"])
def test_foreign_data_in_the_store_ends_the_exchange_only(key, said):
    watch = RankWatch(timeout_seconds=4, on_loss=lambda error: None)
    watch._store = dist.HashStore()
    watch._publish = lambda **_: watch._store.set(key, said)
    if key == "beat/0":
        watch._snapshot_requested.set()
    watch._exchange()
    assert not watch._snapshots and watch._remote_failure is None


@pytest.mark.parametrize(
    "error",
    [  # the first three as seen on CPUs: after kill -9, after SIGSTOP, on a second try
        RuntimeError(
            "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer "
            "[127.0.0.1]:8934. This is typically caused by a remote worker crashing."
        ),
        RuntimeError(
            "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms "
            "for recv operation to complete"
        ),
        RuntimeError("Application timeout caused pair closure"),
        dist.DistBackendError("NCCL communicator was aborted on rank 0."),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
    ],
)
def test_failures_of_the_process_group_are_recognised(error):
    assert peer_error(error).exit_code == 5
    assert str(error).splitlines()[0] in peer_error(error).cause
    with pytest.raises(PeerError), peer_errors():
        raise error


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("gloo")])
def test_other_errors_are_not(error):
    assert peer_error(error) is None
    with pytest.raises(type(error)) as raised, peer_errors():
        raise error
    assert raised.value is error


@pytest.mark.faults
def test_a_process_that_stops_moving_is_ended_with_its_stacks_but_not_while_it_pauses(monkeypatch, capfd):
    left, recorded = [], []
    monkeypatch.setattr("os._exit", left.append)
    with RankWatch(timeout_seconds=2, on_loss=recorded.append) as watch:
        # The watch ends a process after 2 s less five rounds of 0.1 s: 1.5 s.
        time.sleep(1.6)  # the first step may take its time: nothing moved yet
        watch.beat(7)
        with watch.paused():
            time.sleep(1.6)
        assert not left
        wait_until(lambda: left, seconds=20)
    assert set(left) == {5}
    out, err = capfd.readouterr()
    assert "error: no step for 2 s: rank 0 on " in err
    assert "step 7) is in " in err
    assert "in wait_until" in err  # the stack of this very thread
    assert recorded[0].exit_code == 5
    assert out == ""


def test_two_threads_that_diagnose_at_once_have_snapshots_of_their_own(monkeypatch):
    """The main thread's collective fails while the watch diagnoses: neither may take the store for lost."""
    monkeypatch.setattr(heartbeat, "_DIAGNOSIS_SECONDS", 0.5)
    watch = RankWatch(timeout_seconds=4, on_loss=print)
    watch._store = dist.HashStore()
    watch._publish()
    watch._exchanger.start()
    with ThreadPoolExecutor(2) as two:
        first = two.submit(watch._diagnose, "stuck")
        time.sleep(0.45)  # in the last of five rounds of 0.1 s
        causes = [call.result().error.cause for call in (first, two.submit(watch._diagnose, "stuck"))]
    watch._ended.set()
    watch._exchanger.join()
    assert all("rank 0 on" in cause for cause in causes), causes
