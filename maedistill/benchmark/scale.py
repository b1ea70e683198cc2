"""Scaling with the number of processes: measured on this machine for 1 to n, and modelled for clusters.

    torchrun --nproc-per-node 1, 2, 4, ..., n -> rank.py in each -> images/s of all -> against 1 process
    counted or measured step + bytes of gradients -> communication.py -> 8, 64, 512 GPUs

Every process has the same batch and the same number of cores, however many processes there are. All groups of
processes start at the beginning and wait; in each round, each group has one turn.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch

from maedistill.benchmark.communication import BANDWIDTH, FLOPS, AnalyticModel, on_paper
from maedistill.benchmark.report import Report, Row
from maedistill.benchmark.timing import Rates, ratio, spread
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError, PeerError

GPUS = (8, 64, 512)  # sizes of the modelled clusters
_LOOK = 0.05  # seconds between two checks whether a turn is over

Found = dict[str, Any]  # contents of a file that rank.py writes


def measure_scale(config: str, overrides: Sequence[str] = (), *, processes: int | None, rounds: int) -> Report:
    """Measure groups of 1, 2, 4, ... and `processes` training processes (default: one per GPU or core), `rounds` times.

    Raises the errors of loading the config, ConfigError if there are more processes than GPUs or cores, and PeerError
    if one of the processes fails.
    """
    command = [config, *overrides]
    settings = load_config(config, overrides, to_run=False).config
    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    most = processes or gpus or cores
    if most > (gpus or cores):
        raise ConfigError(
            f"--processes: {most} are more than the {gpus or cores} {'GPUs' if gpus else 'cores'}",
            f"measure {gpus or cores} at most",
        )
    share = cores // most or 1
    counts = [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
    with ExitStack() as stack:
        batch = settings.engine.micro_batch_limit if gpus else 0
        ranks = {1: stack.enter_context(_Ranks(1, command, batch=batch, cores=share))}
        ready = ranks[1].ready()
        for count in counts[1:]:
            ranks[count] = stack.enter_context(_Ranks(count, command, batch=ready["batch"], cores=share))
        for others in ranks.values():
            others.ready()
        found: dict[int, list[Found]] = {count: [] for count in counts}
        for number in range(rounds):
            for count in counts if number % 2 else reversed(counts):
                found[count].append(ranks[count].turn(number))
    return scale_report(settings, ready, found, cores=share, has_gpu=gpus > 0)


def scale_report(
    config: PretrainConfig, ready: Found, found: dict[int, list[Found]], *, cores: int, has_gpu: bool
) -> Report:
    """Build the tables: the results of rank.py by number of processes and round, and the modelled clusters."""
    batch, parameters, gflop = ready["batch"], ready["parameters"], ready["gflop"]
    each = {count: _rates_of_each(count, runs) for count, runs in found.items()}
    alone = each[1].spread.median if has_gpu else FLOPS / (gflop * 1e9)
    clusters = paper_clusters(config, parameters=parameters, images_per_second=alone)
    source = "measured above" if has_gpu else f"from {gflop:.4g} GFLOP, counted, at {FLOPS / 1e12:g} TFLOP/s, assumed"
    measured = f"measured: {batch} images per process and update, {cores} core{'s' * (cores > 1)} each"
    tables = {measured: [_measured_row(count, each, runs, batch=batch) for count, runs in found.items()]}
    remarks = [
        "of it gradients: their exchange alone, by ranks that need not wait for each other; what else a step takes "
        "beyond one process's is waiting, and what the others take of memory and caches",
        f"on paper: {alone:,.0f} images/s per GPU ({source}); {4 * parameters / 1e6:,.1f} MB of gradients "
        f"({parameters / 1e6:.1f} M parameters) in a ring at {BANDWIDTH / 1e9:g} GB/s per GPU, assumed, after the "
        "backward pass; no latency, no stragglers, loaders that keep up (benchmark/communication.py)",
    ]
    if not has_gpu:
        tables["how much of the CPU they had"] = [_busy_row(count, each[count], runs) for count, runs in found.items()]
        remarks.append(
            "busy cores: where they are fewer than a process has, other programs had the rest, and the efficiency says "
            "as much about those; images per busy core-second leave them out, but also what is spent in waiting"
        )
    tables["on paper: a model, not measured"] = [_paper_row(cluster) for cluster in clusters]
    return Report(tables, remarks)


def paper_clusters(config: PretrainConfig, *, parameters: int, images_per_second: float) -> list[AnalyticModel]:
    """Model clusters of `GPUS`: first sharing the config's global batch, if possible, then with a micro-batch each."""
    shares = {}
    for gpus in GPUS:
        try:
            plan = config.share_batch(gpus)
        except ConfigError:
            continue
        shares[gpus, plan.micro_batch * plan.accumulation] = None
    shares |= dict.fromkeys((gpus, config.engine.micro_batch_limit) for gpus in GPUS)
    return [
        on_paper(
            gpus,
            images=images,
            images_per_second=images_per_second,
            parameters=parameters,
            zero=config.engine.zero,
        )
        for gpus, images in shares
    ]


def _rates_of_each(count: int, runs: Sequence[Found]) -> Rates:
    """Return the images per second of one of `count` processes, by round."""
    return Rates(tuple(run["images_per_second"] / count for run in runs))


def _measured_row(count: int, each: dict[int, Rates], runs: Sequence[Found], *, batch: int) -> Row:
    """Return the row of a group: images per second of all, efficiency of one against one alone, and a step's time."""
    return {
        "processes": count,
        "images/s": spread(tuple(count * rate for rate in each[count].rounds)),
        "efficiency": ratio(each[count], each[1]),
        "ms per step": spread(tuple(1e3 * batch / rate for rate in each[count].rounds)),
        "of it gradients": spread(tuple(1e3 * run["exchange_seconds"] for run in runs)),
    }


def _busy_row(count: int, each: Rates, runs: Sequence[Found]) -> Row:
    """Return the row of a group: how much of the CPU each process had, and its images per busy core-second."""
    busy = [run["busy_cores"] for run in runs]
    worth = tuple(rate / cores for rate, cores in zip(each.rounds, busy, strict=True))
    return {"processes": count, "busy cores of each": spread(tuple(busy)), "images per busy core-second": spread(worth)}


def _paper_row(cluster: AnalyticModel) -> Row:
    return {
        "GPUs": cluster.ranks,
        "images per GPU": cluster.images,
        "global batch": cluster.ranks * cluster.images,
        "compute ms": round(1e3 * cluster.compute, 3),
        "reduce ms": round(1e3 * cluster.reduce, 3),
        "efficiency": round(cluster.efficiency, 3),
        "images/s": round(cluster.images_per_second),
    }


class _Ranks:
    """A group of training processes that wait for their turn, see rank.py. The context manager ends them on exit."""

    def __init__(self, count: int, command: Sequence[str], *, batch: int, cores: int) -> None:
        self._count, self._folder = count, tempfile.TemporaryDirectory(prefix="maedistill-scale-")
        self._path = Path(self._folder.name)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        rank = ["-m", "maedistill.benchmark.rank", str(self._path), str(batch), str(cores)]
        with (self._path / "stderr").open("w") as errors:
            self._launcher = subprocess.Popen(
                [*launcher, *rank, *command],
                env=os.environ | {"OMP_NUM_THREADS": str(cores), "TMPDIR": str(self._path)},
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        (self._path / "end").touch()
        if kind is not None:
            self._launcher.terminate()  # the launcher ends the ranks
        self._launcher.wait()
        self._folder.cleanup()

    def ready(self) -> Found:
        """Wait until the ranks have built their networks; return the contents of ready.json."""
        return self._wait("ready.json")

    def turn(self, number: int) -> Found:
        """Let the ranks train for turn `number`, while all other groups wait; return the results."""
        (self._path / f"{number}.go").touch()
        return self._wait(f"{number}.json")

    def _wait(self, name: str) -> Found:
        while not (self._path / name).exists():
            if self._launcher.poll() is not None:
                sys.stderr.write((self._path / "stderr").read_text())
                raise PeerError(f"one of {self._count} training processes failed", "its own message is above")
            time.sleep(_LOOK)
        return json.loads((self._path / name).read_text())
