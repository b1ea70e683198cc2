"""How the ranks of a run meet, in real processes: who never comes, who listens, who waits for whom."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.support.launch import free_port, rank_variables

NEVER_MET = {
    "0": "the 2 processes of this run did not find each other within 1 s at 127.0.0.1:0",
    "1": "rank 1 does not reach rank 0 at 127.0.0.1:0 within 1 s",
}


@pytest.mark.faults
@pytest.mark.parametrize("rank", NEVER_MET)
def test_a_rank_whose_peer_never_comes_says_so_and_ends(rank):
    alone = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    code = "from maedistill.errors import exit_code_of; from maedistill.training.engine import initialize_distributed\n"
    code += "raise SystemExit(exit_code_of(lambda: initialize_distributed(1)))"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | alone, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 5
    assert NEVER_MET[rank] in ended.stderr
    assert ended.stdout == ""


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


def start_ranks(code, ranks, port):
    variables = [rank_variables(rank, ranks, port) for rank in range(ranks)]
    words = [sys.executable, "-c", code]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(words, env=os.environ | one, **streams) for one in variables]
    try:
        return [(process.communicate(timeout=120), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("ranks", [1, 2])
def test_on_one_machine_nothing_listens_to_the_network(ranks):
    ended = start_ranks(LISTENERS, ranks, free_port())
    assert [code for _, code in ended] == [0] * ranks, ended
    found = {address for (out, _), _ in ended for address in json.loads(out.splitlines()[-1])}
    assert found <= LOOPBACK
    assert found or ranks == 1, "rank 0 has the store"


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = os.environ | rank_variables(0, 2, port)
        words = [sys.executable, "-c", LISTENERS]
        ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and f"port {port}" in ended.stderr and "--master_port" in ended.stderr


SLOW_FIRST = """
import os, time
from maedistill.errors import exit_code_of
from maedistill.training.engine import initialize_distributed
from maedistill.processes import distributed

def work():
    time.sleep(3)
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
def test_ranks_wait_for_each_other_longer_than_a_collective_may_take():
    ended = start_ranks(SLOW_FIRST.format(on_rank_0="pass"), 2, free_port())
    assert [(out.splitlines()[-1], code) for (out, _), code in ended] == [("0 0", 0), ("1 1", 0)]


@pytest.mark.faults
@pytest.mark.parametrize(("end", "code"), [("raise KeyError('k')", 1), ("os._exit(9)", 9)])
def test_nobody_waits_for_a_rank_0_that_fails_or_is_gone(end, code):
    (_, first), ((_, err), second) = start_ranks(SLOW_FIRST.format(on_rank_0=end), 2, free_port())
    assert (first, second) == (code, 5)
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
def test_a_rank_that_is_lost_before_the_watch_begins_ends_the_others_with_code_5(rank_1):
    """Before rank 0 names the store's prefix, and before the barrier behind it."""
    ((_, err), first), (_, second) = start_ranks(LOST_EARLY.format(rank_1=rank_1), 2, free_port())
    assert (first, second) == (5, 9)
    assert "error: another rank of this run was lost" in err and "Traceback" not in err
