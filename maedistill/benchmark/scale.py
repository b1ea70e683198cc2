"""Scaling with the number of processes on this machine: images per second of 1, 2, 4, ..., n of them.

    torchrun --nproc-per-node 1, 2, 4, ..., n -> `main` below in each -> images/s of all -> against 1 process

Every process has the same batch and as many cores of its own, however many processes there are. Each round starts every
group of processes anew, one after the other.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from maedistill.benchmark.report import Report, Row
from maedistill.benchmark.timing import measure, ratio, repeated, spread
from maedistill.benchmark.training_step import SyntheticTraining, doubled
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError, PeerError, leave
from maedistill.escaping import say
from maedistill.evaluation.latency import seconds_of
from maedistill.processes import distributed
from maedistill.processes.parent_death import die_with_launcher
from maedistill.runs.start import join
from maedistill.training.engine import shutdown_distributed

_SECONDS = 3.0  # of training in a round
_EXCHANGES = 5  # exchanges of gradients that are timed; the fastest counts: slower ones waited for something else


@dataclass(frozen=True)
class Measured:
    """What a group of processes measured in a round."""

    batch: int  # images per process and step
    parameters: int
    images_per_second: float  # of all processes
    exchange_seconds: float  # of an all-reduce of as many numbers as there are gradients; 0 for one process
    busy_cores: float  # mean over the processes


def measure_scale(config: str, overrides: Sequence[str] = (), *, processes: int | None, rounds: int) -> Report:
    """Measure groups of 1, 2, 4, ... and `processes` training processes (default: one per GPU or core), `rounds` times.

    Raises the errors of loading the config, ConfigError if there are more processes than GPUs or cores, and PeerError
    if one of the processes fails.
    """
    settings = load_config(config, overrides, root=PretrainConfig, to_run=False).config
    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    most = processes or gpus or cores
    if most > (gpus or cores):
        raise ConfigError(
            f"--processes: {most} are more than the {gpus or cores} {'GPUs' if gpus else 'cores'}",
            f"measure {gpus or cores} at most",
        )
    share = cores // most or 1
    counts = doubled(most)
    measured: dict[int, list[Measured]] = {count: [] for count in counts}
    batch = settings.engine.micro_batch_limit if gpus else 0  # 0: chosen by the first group, which has one process
    for number in range(rounds):
        for count in reversed(counts) if number % 2 else counts:
            measured[count].append(_torchrun(count, batch, share, config, *overrides))
            batch = measured[count][-1].batch
    return scale_report(measured, cores=share, has_gpu=gpus > 0)


def _torchrun(count: int, batch: int, cores: int, config: str, *overrides: str) -> Measured:
    """Run `main` in `count` processes and return what they measured."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    with tempfile.TemporaryDirectory(prefix="maedistill-scale-") as folder:
        result = Path(folder, "measured.json")
        ended = subprocess.run(
            [*launcher, "-m", "maedistill.benchmark.scale", str(result), str(batch), str(cores), config, *overrides],
            env=os.environ | {"OMP_NUM_THREADS": str(cores), "TMPDIR": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if ended.returncode:
            say(*ended.stderr.splitlines(), error=True)
            raise PeerError(f"one of {count} training processes failed", "its own message is above")
        return Measured(**json.loads(result.read_text()))


def main(result: str, batch: str, cores: str, config: str, *overrides: str) -> None:
    """Train for some seconds as one of the processes of torchrun; rank 0 writes `Measured` to a file. Collective.

    batch: images per step; 0: as many as take at most a second, for a single process. cores: the process is pinned to
    so many cores of its own, so that a single one has no more of the machine than each of many.
    """
    die_with_launcher()
    first, allowed = int(os.environ["LOCAL_RANK"]) * int(cores), sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[first : first + int(cores)] or allowed)  # more GPUs than cores
    settings = load_config(config, overrides, root=PretrainConfig, to_run=False).config
    join(settings)
    training = SyntheticTraining(settings, distributed.device())
    device, step, ranks = training.device, training.engine_step(), distributed.world_size()
    if int(batch):
        training.set_batch_size(int(batch))
    else:
        training.autotune_batch(step)
    rate, per_core = measure(repeated(step, device, images=training.batch, seconds=_SECONDS)())
    values = {"rate": torch.tensor(rate, device=device), "busy": torch.tensor(rate / per_core, device=device)}
    total = distributed.all_reduce_sum(values)
    gradients, exchanges = torch.zeros(training.num_parameters, device=device), []
    for _ in range(_EXCHANGES if ranks > 1 else 0):
        distributed.barrier()
        exchanges.append(seconds_of(partial(dist.all_reduce, gradients), device))
    exchange = min(exchanges, default=0.0)
    if distributed.is_main():
        busy_cores = total["busy"] / ranks
        measured = Measured(training.batch, training.num_parameters, total["rate"], exchange, busy_cores=busy_cores)
        Path(result).write_text(json.dumps(asdict(measured)))
    shutdown_distributed()


def scale_report(measured: Mapping[int, Sequence[Measured]], *, cores: int, has_gpu: bool) -> Report:
    """Build the table of what was measured, by number of processes and round."""
    first, single = measured[1][0], [one.images_per_second for one in measured[1]]
    rows: list[Row] = []
    for count, rounds in measured.items():
        each, busy = [one.images_per_second / count for one in rounds], [one.busy_cores for one in rounds]
        row = {
            "processes": count,
            "images/s": spread([one.images_per_second for one in rounds]),
            "efficiency": ratio(each, single),
            "ms per step": spread([1e3 * first.batch / rate for rate in each]),
            "of which gradients": spread([1e3 * one.exchange_seconds for one in rounds]),
        }
        cores_row = {"busy cores of each": spread(busy), "images per busy core-second": ratio(each, busy)}
        rows.append(row if has_gpu else row | cores_row)
    remarks = [
        f"of which gradients: the all-reduce alone, of {first.parameters / 1e6:.1f} M parameters; what else a step "
        "takes longer than with one process is waiting, and contention for memory and caches",
        "larger clusters: `maedistill benchmark cost --gpus N` models them",
    ]
    if not has_gpu:
        remarks.append(
            "busy cores: if a process kept fewer busy than it has, other programs ran, and the efficiency is partly "
            "theirs; images per busy core-second do not depend on them, but do not count waiting either"
        )
    title = f"{first.batch} images per process and update, {cores} core{'s' * (cores > 1)} each"
    return Report({title: rows}, remarks)


if __name__ == "__main__":
    leave(lambda: main(*sys.argv[1:]))
