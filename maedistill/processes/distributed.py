"""Ranks and collectives, for one or more processes started by torchrun, deepspeed, srun or directly.

`prepare_environment` converts the launcher's environment variables into the five that torch reads. `open_group` exports
them and opens the process group. All other functions also work with one process and without a group. Every rank must
call the functions marked "Collective", in the same order.
"""

import itertools
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from maedistill.errors import ConfigError, PeerError, UserError
from maedistill.escaping import say
from maedistill.machine import named_gpus
from maedistill.processes.rendezvous import open_local_store, rendezvous_error

T = TypeVar("T")
_NCCL_GRACE_SECONDS = 60
_POLL_SECONDS = 0.1  # between looks whether rank 0 is done
_timeout = timedelta(minutes=10)
_counters = itertools.count()

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def open_group(timeout_seconds: int) -> None:
    """Open the process group of this run: NCCL on GPUs, gloo on CPUs.

    A collective that waits longer than `timeout_seconds` for a rank fails. NCCL's own limit is a minute longer: it ends
    the process without a message, so heartbeat.py first reports which rank is missing. Raises PeerError if not all
    ranks arrive, or if NCCL cannot connect them. A group that is open, as in a second run of one Python program, stays,
    with the new limit.
    """
    global _timeout
    _timeout = timedelta(seconds=timeout_seconds + (_NCCL_GRACE_SECONDS if torch.cuda.is_available() else 0))
    if dist.is_initialized():
        set_collective_timeout()
        return
    os.environ.update(prepare_environment(os.environ))
    ranks = int(os.environ["WORLD_SIZE"])
    gpu = _take_gpu(int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else None
    timeout = timedelta(seconds=timeout_seconds)
    try:
        dist.init_process_group(
            "gloo" if gpu is None else "nccl",
            timeout=timeout,
            world_size=ranks,
            rank=int(os.environ["RANK"]),
            store=open_local_store(ranks, timeout),
            device_id=gpu if ranks > 1 else None,
        )
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise rendezvous_error(error, ranks, timeout_seconds) from error
    except dist.DistBackendError as error:
        # The last line of NCCL's report says what failed; earlier lines give the place in its source.
        lines = [line.strip() for line in str(error).splitlines()]
        reasons = [line for line in lines if line and not line.startswith("Last error")] or [type(error).__name__]
        raise PeerError(
            f"NCCL could not connect the {ranks} ranks of this run ({reasons[-1]})",
            "NCCL_DEBUG=INFO has more; often NCCL_SOCKET_IFNAME must name the network interface, or two ranks share a "
            "GPU",
        ) from error
    set_collective_timeout()


def set_collective_timeout() -> None:
    """Set the timeout of `open_group` on every process group opened so far.

    Libraries open groups without a timeout, which then have the backend's default: 10 minutes for NCCL.
    """
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # torch 2.11 to 2.13
    for group in dist.distributed_c10d._world.pg_map:
        set_timeout(_timeout, group)


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Return the number of this process on its machine, from 0. It is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if dist.is_initialized() else 0


def cores() -> int:
    """Return how many CPU cores are this rank's: those that it may use, shared with ranks that may use them too.

    Some launchers give each rank cores of its own. Collective.
    """
    mine = platform.node(), os.sched_getaffinity(0)
    others = [allowed for node, allowed in gather_objects(mine) if node == mine[0]]
    return max(1, len(mine[1]) // sum(not mine[1].isdisjoint(allowed) for allowed in others))


def is_main() -> bool:
    """Return whether this is rank 0, the only rank that prints and writes files."""
    return rank() == 0


def device() -> torch.device:
    """Return the device of this process: its GPU, or the CPU if there is none."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    """Wait until every rank has called this. Collective."""
    if world_size() > 1:
        dist.barrier(device_ids=[local_rank()] if dist.get_backend() == "nccl" else None)


def broadcast_object(value: T) -> T:
    """Return rank 0's `value` (any small picklable object) on every rank. Collective."""
    if world_size() == 1:
        return value
    box: list[Any] = [value if is_main() else None]
    dist.broadcast_object_list(box, src=0, device=device())
    return box[0]


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 only; return its result, or raise its error, on every rank. Collective.

    `work` must not call collectives. Rank 0 raises what `work` raised. The others raise the same `UserError`, or a
    `PeerError` that quotes any other error, so that no rank waits for one that is gone.
    """
    result: Any = None
    error: Exception | None = None
    news: UserError | None = None  # what the other ranks raise
    if is_main():
        try:
            result = work()
        except UserError as raised:
            error = news = raised
        except Exception as raised:
            error = raised
            news = PeerError(f"rank 0 failed: {type(raised).__name__}: {raised}", "see rank 0's traceback")
    result, news = broadcast_object((result, news))
    if news is not None:
        raise error or news
    return result


def main_first(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 first and then on the others, which find its results in the cache. Collective.

    Ranks wait for each other without a limit: a scan of all shards or a download may take longer than any collective
    may. Raises PeerError if rank 0, or the launcher that keeps the store, is gone.
    """
    if world_size() == 1:
        return work()
    mine: list[T] = []
    name, store = f"maedistill/first/{next(_counters)}", dist.distributed_c10d._get_default_store()

    def work_here() -> None:
        try:
            mine.append(work())
        finally:
            store.set(f"{name}/{rank()}", "done")

    if not is_main():
        _wait_for(store, [f"{name}/0"], "rank 0")
    on_main(work_here)
    if is_main():
        _wait_for(store, [f"{name}/{other}" for other in range(1, world_size())], "the other ranks")
    else:
        work_here()
    return mine[0]


def _wait_for(store: dist.Store, keys: list[str], who: str) -> None:
    """Wait until all keys are set. Ranks 0 and 1 say so if it takes longer than a collective may."""
    until = time.monotonic() + _timeout.total_seconds()
    try:
        while not store.check(keys):
            if time.monotonic() > until and rank() <= 1:
                say(f"rank {rank()} waits for {who} to scan shards or fetch weights")
                until = math.inf
            time.sleep(_POLL_SECONDS)
    except dist.DistError as error:
        raise PeerError(f"rank 0 or its launcher is gone: {error}", "see its messages, then start again") from error


def shared_counter() -> Callable[[], int]:
    """Return a function that counts 0, 1, 2, ... for all ranks together: each number goes to one rank. Collective.

    The function waits for nobody: a rank that calls it gets the next number, whatever the others do.
    """
    if world_size() == 1:
        return itertools.count().__next__
    name, store = f"maedistill/counter/{next(_counters)}", dist.distributed_c10d._get_default_store()
    return lambda: int(store.add(name, 1)) - 1


def all_reduce_sum(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the sums of named scalars over ranks, with one float64 reduction and one device sync. Collective."""
    if not values:
        return {}
    sums = torch.stack([value.detach().to(torch.float64).reshape(()) for value in values.values()])  # [V]
    if world_size() > 1:
        dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def all_reduce_tensor(values: Tensor) -> Tensor:
    """Return the sum of a tensor over ranks, without a wait of the host for the device. Collective."""
    values = values.clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast_tensor(value: Tensor | None, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return rank 0's tensor (the others pass None) on every rank's device. Collective."""
    received = torch.empty(shape, dtype=dtype, device=device())
    if is_main():
        assert value is not None
        received.copy_(value)
    if world_size() > 1:
        dist.broadcast(received, src=0)
    return received


@torch.no_grad()
def broadcast_in_place(tensors: Sequence[Tensor]) -> None:
    """Set tensors on this rank's device to rank 0's values, in one message for each number format. Collective."""
    if world_size() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in alike])
        dist.broadcast(flat, src=0)
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def copy_to_main(tensors: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Store a CPU copy of `value`, whole in memory, as `tensors[name]` on rank 0; do nothing on other ranks."""
    if is_main():
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def gather_objects(value: T) -> list[T]:
    """Return the picklable values of all ranks in rank order, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order: [n_r, ...] per rank, n_r may differ -> [sum n_r, ...]. Collective."""
    if world_size() == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    longest = int(torch.cat(counts).max())
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def prepare_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the five variables of `VARIABLES` for this process, from those that its launcher set.

    torchrun and deepspeed set all of them. srun sets SLURM_*. A start without a launcher is one process. Explicit
    MASTER_ADDR and MASTER_PORT take precedence. Raises ConfigError if a launcher set only some of the variables.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        missing = [name for name in VARIABLES if name not in environ]
        if missing:
            raise ConfigError(
                f"{', '.join(missing)} not set, but {'RANK' if 'RANK' in environ else 'WORLD_SIZE'} is",
                "start with torchrun, deepspeed or srun, or unset RANK and WORLD_SIZE for one process",
            )
        return {name: environ[name] for name in VARIABLES}
    # A batch script also sees SLURM_NTASKS, but only a task that srun started has SLURM_STEP_ID.
    if {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"} <= environ.keys():
        return _slurm_environment(environ)
    # Port 0: the system picks a free port, so that two runs on a machine never collide.
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def first_host(nodelist: str) -> str:
    """Return the first host of SLURM's compact list: 'gpu[003-006,9],login' -> 'gpu003'."""
    entry = re.findall(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)[0]  # up to the first comma outside brackets
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", entry)


def _take_gpu(number: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if number >= gpus:
        raise ConfigError(
            f"rank {os.environ['RANK']} is number {number} (from 0) on its machine, which has {gpus} GPUs",
            "start at most one rank per GPU: torchrun --nproc-per-node, or srun --ntasks-per-node",
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _slurm_environment(environ: Mapping[str, str]) -> dict[str, str]:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")  # a step may run on some of a job's nodes
    nodelist = next((environ[name] for name in names if environ.get(name)), "127.0.0.1")
    # All ranks of a job must compute the same port, and two jobs on a node different ports.
    port = 20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000
    # With --gpus-per-task a task sees one GPU as number 0, whatever its name.
    alone = len(named_gpus(environ) or []) == 1
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_NTASKS"],
        "LOCAL_RANK": "0" if alone else environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(nodelist),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port),
    }
