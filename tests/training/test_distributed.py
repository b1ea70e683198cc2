"""Who am I, from each launcher's environment; and what the collectives give on one and on two processes."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from maedistill.errors import ConfigError
from maedistill.processes.distributed import first_host, prepare_environment
from tests.support.launch import free_port, rank_variables


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node7", "node7"),
        ("gpu[003-006,9],login", "gpu003"),
        ("gpu-a[1,3]-ib", "gpu-a1-ib"),
        ("rack[02-03]n[1-4]", "rack02n1"),
        ("a,b[1-2]", "a"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_first_host_of_a_compact_list(nodelist, host):
    assert first_host(nodelist) == host


def test_slurm_tasks_agree_on_address_and_port():
    shared = {
        "SLURM_NTASKS": "8",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NODELIST": "gpu[10-12]",
        "SLURM_STEP_NODELIST": "gpu[11-12]",
        "SLURM_JOB_ID": "123456",
        "PATH": "/bin",
    }
    tasks = [prepare_environment(shared | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % 4)}) for i in range(8)]
    assert [(task["RANK"], task["LOCAL_RANK"], task["WORLD_SIZE"]) for task in tasks] == [
        (str(i), str(i % 4), "8") for i in range(8)
    ]
    assert {(task["MASTER_ADDR"], task["MASTER_PORT"]) for task in tasks} == {("gpu11", "23456")}


@pytest.mark.parametrize(
    ("visible", "local_rank"),
    [
        ("3", "0"),
        ("GPU-3f1c7d0e-7a54-2f6b-9d2c-0c1f5a1f6a55", "0"),
        ("MIG-c5b1e2a4-0f37-5d2b-8f0e-6a1d3c9e7b10", "0"),
        ("MIG-GPU-3f1c7d0e-7a54-2f6b-9d2c-0c1f5a1f6a55/1/0", "0"),
        ("GPU-3f1c,GPU-90ab", "1"),
        ("0,1", "1"),
        ("", "1"),
        ("-1", "1"),
    ],
)
def test_a_task_that_sees_one_gpu_takes_it_whatever_its_name(visible, local_rank):
    """As srun --gpus-per-task leaves it, where the second task of a machine has its own GPU as number 0."""
    task = {"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    assert prepare_environment(task | {"CUDA_VISIBLE_DEVICES": visible})["LOCAL_RANK"] == local_rank


def test_torchrun_wins_over_slurm_and_is_taken_as_it_is():
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "5"}
    assert prepare_environment(given | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == given


def test_a_bare_start_is_one_process():
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}  # sbatch's script itself, not srun's task
    assert prepare_environment(script)["WORLD_SIZE"] == "1"
    environment = prepare_environment({"PATH": "/bin"})
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("0", "1", "0")


def test_half_an_environment_is_refused_by_name():
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT not set, but RANK is"):
        prepare_environment({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


@pytest.mark.parametrize("ranks", [1, 2])
def test_collectives(runs, ranks):
    for rank in range(ranks):
        got = runs["first", ranks][rank]["collectives"]
        assert got["mean"] == {"a": (ranks - 1) / 2, "b": 1 + 2e-8}  # float64: 2e-8 is lost in float32
        assert torch.equal(got["rows"], torch.arange(6).view(3, 2))  # 3 rows of rank 0, none of rank 1
        assert got["object"] == {"rank": 0}
        assert got["on_main"] == 0
        assert torch.equal(got["tensor"], torch.arange(3))


def test_a_failure_on_rank_0_reaches_every_rank(runs):
    told = [runs["first", 2][rank]["collectives"]["errors"] for rank in range(2)]
    assert told[0] == [("DataError", "a cause\na remedy"), ("KeyError", "'name'")]
    assert told[1][0] == ("DataError", "a cause\na remedy")
    assert told[1][1] == ("PeerError", "rank 0 failed: KeyError: 'name'\nsee rank 0's traceback")


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
    return [(process.communicate(timeout=120), process.returncode) for process in started]


@pytest.mark.parametrize("ranks", [1, 2])
def test_on_one_machine_nothing_listens_to_the_network(ranks):
    for (out, err), code in start_ranks(LISTENERS, ranks, free_port()):
        assert code == 0, err
        assert set(json.loads(out.splitlines()[-1])) <= LOOPBACK


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
    initialize_distributed(2)  # seconds, for a collective
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
