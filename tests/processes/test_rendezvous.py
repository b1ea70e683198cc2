"""How the ranks of a run meet, in real processes: who never comes, who listens, who waits for whom."""

import json
import socket

import pytest

from tests.support.launch import rank_variables

MEET = """
from maedistill.errors import exit_code_of
from maedistill.training.engine import initialize_distributed

raise SystemExit(exit_code_of(lambda: initialize_distributed(1)))
"""
NEVER_MET = {"0": "the 2 processes of this run did not find each other within 1 s", "1": "rank 1 does not reach rank 0"}


@pytest.mark.faults
@pytest.mark.parametrize("rank", NEVER_MET)
def test_a_rank_whose_peer_never_comes_says_so_and_ends(launcher, tmp_path, rank):
    alone = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ended = launcher.start_text(tmp_path, MEET, **alone).finish(5)
    assert NEVER_MET[rank] in ended.err and "127.0.0.1:0" in ended.err and ended.out == ""


LISTENERS = """
import json, os
from contextlib import suppress
from maedistill.errors import exit_code_of
from maedistill.training.engine import initialize_distributed
from maedistill.processes import distributed

def listening():
    sockets = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            sockets.add(os.readlink(f"/proc/self/fd/{name}"))
    lines = [line.split() for table in ("tcp", "tcp6") for line in open(f"/proc/net/{table}").readlines()[1:]]
    return [words[1].split(":")[0] for words in lines if words[3] == "0A" and f"socket:[{words[9]}]" in sockets]

def main():
    initialize_distributed(30)
    distributed.barrier()
    print(json.dumps(listening()))
    distributed.barrier()

raise SystemExit(exit_code_of(main))
"""
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}  # 127.0.0.1 and ::1


@pytest.mark.parametrize("ranks", [1, 2])
def test_on_one_machine_nothing_listens_to_the_network(launcher, tmp_path, ranks):
    started = launcher.start_text(tmp_path, LISTENERS, ranks=ranks)
    started.finish()
    found = {address for rank in range(ranks) for address in json.loads(started.said(rank)[0].splitlines()[-1])}
    assert found <= LOOPBACK
    assert found or ranks == 1, "rank 0 has the store"


def test_a_port_in_use_is_named(launcher, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = launcher.start_text(tmp_path, LISTENERS, **rank_variables(0, 2, port)).finish(2)
    assert f"port {port}" in ended.err and "--master_port" in ended.err


SLOW_FIRST = """
import os, time
from maedistill.errors import exit_code_of
from maedistill.training.engine import initialize_distributed
from maedistill.processes import distributed

def work():
    time.sleep({seconds})
    if distributed.is_main():
        {on_rank_0}
    return distributed.rank()

def main():
    initialize_distributed(60)  # seconds, to meet
    initialize_distributed(2)  # and from here on for a collective
    print(distributed.main_first(work), distributed.main_first(distributed.rank), flush=True)

try:
    code = exit_code_of(main)
except KeyError:
    code = 1
os._exit(code)  # at once: gloo may abort a process that ends while its peers do
"""


@pytest.mark.faults
def test_ranks_wait_for_each_other_longer_than_a_collective_may_take(launcher, tmp_path):
    started = launcher.start_text(tmp_path, SLOW_FIRST.format(seconds=3, on_rank_0="pass"), ranks=2)
    started.finish()
    assert [started.said(rank)[0].splitlines()[-1] for rank in range(2)] == ["0 0", "1 1"]


@pytest.mark.faults
@pytest.mark.parametrize(("end", "code"), [("raise KeyError('k')", 1), ("os._exit(9)", 9)])
def test_nobody_waits_for_a_rank_0_that_fails_or_is_gone(launcher, tmp_path, end, code):
    started = launcher.start_text(tmp_path, SLOW_FIRST.format(seconds=0.5, on_rank_0=end), ranks=2)
    assert started.wait() == [code, 5]
    _, err = started.said(1)
    assert "rank 0" in err and "Traceback" not in err


LOST_EARLY = """
import os
from maedistill.errors import leave
from maedistill.processes import distributed
from maedistill.processes.heartbeat import RankWatch
from maedistill.training.engine import initialize_distributed

def main():
    initialize_distributed(60)
    if distributed.rank() == 1:
        {rank_1}
    with RankWatch(timeout_seconds=60, on_loss=print):
        pass

leave(main)
"""


@pytest.mark.faults
@pytest.mark.parametrize("rank_1", ["os._exit(9)", "distributed.broadcast_object(None); os._exit(9)"])
def test_a_rank_that_is_lost_before_the_watch_begins_ends_the_others_with_code_5(launcher, tmp_path, rank_1):
    """Before rank 0 names the store's prefix, and before the barrier behind it."""
    started = launcher.start_text(tmp_path, LOST_EARLY.format(rank_1=rank_1), ranks=2)
    assert started.wait() == [5, 9]
    _, err = started.said()
    assert "error: another rank of this run was lost" in err and "Traceback" not in err
