"""One rank of `benchmark scale`: runs training steps for a few seconds whenever its group of processes has a turn.

    torchrun --nproc-per-node K -m maedistill.benchmark.rank FOLDER BATCH CORES CONFIG key=value ...

    FOLDER/ready.json   written by the rank once its networks are built: batch, parameters, gflop
    FOLDER/N.go         created by the parent process: turn N begins
    FOLDER/N.json       written by the rank when the turn is over: images_per_second, exchange_seconds, busy_cores
    FOLDER/end          created by the parent process: there are no more turns

BATCH: images per rank and step; 0 chooses as many as take about a second, for a single rank only. CORES: cores per
rank. Each rank is pinned to its own, so that a single rank has no more of the machine than each of many. All ranks poll
for the files instead of waiting in a collective, which would keep a GPU busy.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from maedistill.benchmark.engine_step import EngineStep
from maedistill.config.loader import load_config
from maedistill.errors import PeerError, leave
from maedistill.processes import distributed
from maedistill.processes.parent_death import die_with_launcher
from maedistill.runs.start import join
from maedistill.training.engine import shutdown_distributed

TURN_SECONDS = 3.0
_STEP_SECONDS = 1.0  # longest time of a step, if the batch may be chosen
_FEWEST = 3  # fewest steps of a turn, however long they take
_EXCHANGES = 5  # exchanges of gradients that are timed; the fastest counts
_LOOK, _PATIENCE = 0.02, 600.0  # seconds between two looks for a turn, and until the rank gives up waiting


def main(folder: str, batch: str, cores: str, config: str, *overrides: str) -> None:
    """Measure turns until FOLDER/end exists. Collective."""
    die_with_launcher()
    keep_to_cores(int(os.environ["LOCAL_RANK"]), int(cores))
    settings = load_config(config, overrides, to_run=False).config
    join(settings)
    step = EngineStep(settings)
    if int(batch):
        step.take(int(batch))
    else:
        step.autotune_batch(_STEP_SECONDS)
    step()
    _say(Path(folder, "ready.json"), {"batch": step.batch, "parameters": step.parameters, "gflop": step.gflop})
    number = 0
    while has_turn(Path(folder), number):
        _say(Path(folder, f"{number}.json"), turn(step, TURN_SECONDS))
        number += 1
    shutdown_distributed()


def has_turn(folder: Path, number: int) -> bool:
    """Wait for a turn and return True; return False if there are no more. Raise PeerError after `_PATIENCE` seconds."""
    start = time.monotonic()
    while time.monotonic() - start < _PATIENCE:
        if (folder / f"{number}.go").exists():
            return True
        if (folder / "end").exists():
            return False
        time.sleep(_LOOK)
    raise PeerError(f"no turn for {_PATIENCE:g} s", "start the benchmark again")


def turn(step: EngineStep, seconds: float) -> dict[str, float]:
    """Train for about `seconds` and return the speed of all ranks. Collective: all ranks run equally many steps."""
    steps = distributed.broadcast_object(max(_FEWEST, round(seconds / step.seconds())))
    distributed.barrier()
    start, busy = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step.launch()
    step.wait()
    busy = time.process_time() - busy
    distributed.barrier()
    spent = time.perf_counter() - start
    return {
        "images_per_second": steps * step.batch * distributed.world_size() / spent,
        "exchange_seconds": exchange_seconds(step),
        "busy_cores": distributed.all_reduce_mean({"busy": torch.tensor(busy / spent, device=step.device)})["busy"],
    }


def exchange_seconds(step: EngineStep) -> float:
    """Return the seconds that ranks take to all-reduce as many numbers as they have gradients; 0 for one. Collective.

    All ranks start together. The fastest of a few trials counts, because slower ones have waited for something else.
    """
    gradients, times = torch.zeros(step.parameters, device=step.device), []
    for _ in range(_EXCHANGES if distributed.world_size() > 1 else 0):
        distributed.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradients)
        step.wait()
        times.append(time.perf_counter() - start)
    return min(times, default=0.0)


def keep_to_cores(rank: int, cores: int) -> None:
    """Pin this process, and all processes that it starts, to the rank's own `cores` cores."""
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[rank * cores : (rank + 1) * cores])


def _say(file: Path, found: dict[str, Any]) -> None:
    """Write a file atomically, on rank 0 only."""
    if distributed.is_main():
        file.with_suffix(".tmp").write_text(json.dumps(found))
        file.with_suffix(".tmp").rename(file)


if __name__ == "__main__":
    leave(lambda: main(*sys.argv[1:]))
