"""Ranks of a tiny loop with PreemptionHandler and RankWatch, as processes that a test kills, stops and signals.

They are forked from a server that has imported torch already: a start takes half a second instead of several. What a
rank prints, `exit.json` included, is in FOLDER/rank-N.txt; it leaves with the exit code of a tool.
"""

import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from maedistill.errors import DataError, Preempted, UserError, exit_code_of
from maedistill.processes import distributed
from maedistill.processes import heartbeat as peers_file
from maedistill.processes.heartbeat import RankWatch
from maedistill.processes.parent_death import detach_worker, die_with_launcher
from maedistill.processes.preemption import PreemptionHandler
from maedistill.runs.async_saver import Saver, _Writing
from tests.support.launch import free_port

STEPS = 400  # of 20 ms and more
TIMEOUT = 8  # seconds that a rank waits for another


def start_ranks(folder: Path, fault: str, *, ranks: int = 2, workers: int = 0) -> list[BaseProcess]:
    """Start them; `fault` is what rank 1 does to itself at step 10."""
    server = multiprocessing.get_context("forkserver")
    ours = [f"maedistill.processes.{name}" for name in ("preemption", "heartbeat")]
    server.set_forkserver_preload(["torch.utils.data", *ours])
    port, processes = free_port(), []
    for rank in range(ranks):
        numbers = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
        environment = {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
        processes.append(server.Process(target=_be_a_rank, args=(folder, fault, workers, environment)))
        processes[-1].start()
    return processes


def _be_a_rank(folder: Path, fault: str, workers: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    output = os.open(folder / f"rank-{environment['RANK']}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os._exit(exit_code_of(lambda: _train(fault, workers)))


def _record(error: UserError) -> None:
    print(f"exit.json {error.exit_code} {error.cause}", flush=True)


def _train(fault: str, workers: int) -> None:
    distributed.open_group(TIMEOUT)
    unheard = fault == "dies unheard"  # as under NCCL: the host of rank 0 waits for a device, and nothing tells it
    peers_file._STUCK_SECONDS = 2.0
    timeout = 600 if unheard else TIMEOUT
    with RankWatch(timeout_seconds=timeout, on_loss=_record) as watch, Saver(Path(), keep=1) as saver:
        watch.before_leaving = saver.wait
        stop = PreemptionHandler(timeout_seconds=TIMEOUT, leave=lambda: os._exit(130))
        fork = {"multiprocessing_context": "fork", "worker_init_fn": _begin} if workers else {}
        batches = iter(DataLoader(range(STEPS), num_workers=workers, **fork))
        for step in range(1, STEPS + 1):
            next(batches)
            watch.beat(step - 1)
            if step == 10 and distributed.rank() == 1:
                _do(fault)
            if step == 10 and "rank 0 saves" in fault:
                saver._writing = _Writing(partial(_save_slowly), step)
            if step == 10 and unheard:
                time.sleep(600)
            dist.all_reduce(torch.ones(10))
            time.sleep(0.02)
            watch.beat(step)
            print(f"step {step}", flush=True)
            if stop.agreed():
                raise Preempted(stop.signal.name, step)
        stop.close()


def _begin(_: int) -> None:
    detach_worker()
    print(f"worker {os.getpid()}", flush=True)


def _save_slowly() -> None:
    time.sleep(4)  # the main thread gets 1 s to notice that rank 1 has failed
    print("saved", flush=True)


def _do(fault: str) -> None:
    if fault.startswith("data"):
        raise DataError("shard 3 is gone", "bring it back")
    if fault == "dies unheard":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(600)


if __name__ == "__main__":  # a rank under a launcher: FOLDER WORKERS
    die_with_launcher()
    _be_a_rank(Path(sys.argv[1]), "", int(sys.argv[2]), {"RANK": os.environ["RANK"]})
