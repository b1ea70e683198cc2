"""Rank, address and port from each launcher's environment."""

import pytest

from maedistill.errors import ConfigError
from maedistill.processes import distributed
from maedistill.processes.distributed import first_host, prepare_environment


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


@pytest.mark.parametrize(
    ("ranks", "mine"),  # the node of each rank and the cores that it may use
    [
        ([("a", 0, 96)], 96),
        ([("a", 0, 96)] * 8 + [("b", 0, 96)] * 8, 12),  # a launcher that binds nothing
        ([("a", 12 * rank, 12 * rank + 12) for rank in range(8)], 12),  # cores of its own for each
        ([("a", 0, 2)] * 4, 1),
    ],
)
def test_a_rank_shares_its_cores_with_those_that_may_use_them(monkeypatch, ranks, mine):
    allowed = [(node, set(range(first, end))) for node, first, end in ranks]
    monkeypatch.setattr(distributed.platform, "node", lambda: "a")
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda _: allowed[0][1])
    monkeypatch.setattr(distributed, "gather_objects", lambda _: allowed)
    assert distributed.cores() == mine
