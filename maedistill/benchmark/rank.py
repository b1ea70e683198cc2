"""One rank of `benchmark scale`: makes steps for some seconds whenever its processes have their turn.

    torchrun --nproc-per-node K -m maedistill.benchmark.rank FOLDER BATCH CORES CONFIG key=value ...

    FOLDER/ready.json   written when the rank's networks stand: batch, parameters, gflop
    FOLDER/N.go         whoever started the ranks makes it: the N-th turn begins
    FOLDER/N.json       written when it is over: images_per_second, exchange_seconds, busy_cores
    FOLDER/end          no more turns

BATCH: images per rank and step; 0: as many as take about a second, for one rank alone. CORES: per rank, which keeps to
its own, so that one rank alone has no more of the machine than each of many. All ranks look for the files, and none
waits in a collective for its turn: on a GPU that would keep the device busy.
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
from maedistill.processes import ranks as distributed
from maedistill.processes.parent_death import die_with_launcher
from maedistill.runs.start import join
from maedistill.training.engine import shutdown_distributed

TURN_SECONDS = 3.0
_STEP_SECONDS = 1.0  # that a step takes at most, where the batch may be chosen
_FEWEST = 3  # steps of a turn, however long they take
_EXCHANGES = 5  # of gradients, of which the fastest counts
_LOOK, _PATIENCE = 0.02, 600.0  # seconds between two looks for a turn, and after which there is none to come


def main(folder: str, batch: str, cores: str, config: str, *overrides: str) -> None:
    """Measures until it is told to end. Collective."""
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
    """Waits for a turn; False where there are no more. Raises PeerError where nobody gives one."""
    start = time.monotonic()
    while time.monotonic() - start < _PATIENCE:
        if (folder / f"{number}.go").exists():
            return True
        if (folder / "end").exists():
            return False
        time.sleep(_LOOK)
    raise PeerError(f"no turn for {_PATIENCE:g} s", "start the benchmark again")


def turn(step: EngineStep, seconds: float) -> dict[str, float]:
    """What all ranks do in about `seconds`. Collective: all make equally many steps."""
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
    """How long the ranks take to add up as many numbers as they have gradients, all being there; 0 for one. Collective.

    The fastest of a few times: what is slower has waited for something else.
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
    """Leaves this process, and all that it starts, the rank's own `cores` cores."""
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[rank * cores : (rank + 1) * cores])


def _say(file: Path, found: dict[str, Any]) -> None:
    """Writes a file whole or not at all; rank 0 does."""
    if distributed.is_main():
        file.with_suffix(".tmp").write_text(json.dumps(found))
        file.with_suffix(".tmp").rename(file)


if __name__ == "__main__":
    leave(lambda: main(*sys.argv[1:]))
