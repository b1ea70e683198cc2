"""One run under random faults for as long as asked: it must end as if nothing had happened, and leave nothing behind.

    python -m tests.faults.soak --minutes 30 [--seed 7] [--gap 8]

AMD on two ranks with two loader workers and one damaged image. First the run goes through in one piece, then it goes
again, slowed down to the time asked, with a fault every `--gap` seconds on average (harm.py), and is started again
whenever it has ended. Prints faults and exit codes, memory, processes and files left, and whether the bytes are equal.
"""

import argparse
import hashlib
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from maedistill.runs.checkpoint import latest_step
from tests.conftest import write_shards
from tests.faults.harm import FAULTS, PEER, Scene
from tests.faults.notes import WEIGHTS, same_result
from tests.support.launch import Launcher, Start

RANKS, BATCH, IMAGES, STEPS_A_MINUTE = 2, 12, 96, 120
SETTLED = 6.0  # seconds after its start from which on a start's memory counts
GROWTH = 20.0  # MB of all processes together, from the first to the last quarter, that count as flat
CONFIG = """\
data: {{train: {shards}/train-*.tar, image_size: 32, workers: 1, max_bad_fraction: 1.0}}
student: {{model: vit_tiny_patch16_224, width: 32, depth: 2, num_heads: 2, patch_size: 8}}
decoder: {{width: 16, depth: 1, num_heads: 2}}
optim: {{epochs: {epochs}, warmup_epochs: 0.5, global_batch: 12, lr: 3e-3, ema: 0.9}}
engine: {{timeout_seconds: 30}}
log: {{every_steps: 1, save_every_epochs: 0.5, pictures_every_epochs: {pictures}, trackers: []}}
"""
AMD = [
    "method=amd",
    "data.keep_decoded=false",
    "masks.teacher_keep_ratio=0.5",
    "align.student=[0,1]",
    "align.teacher=[0,1]",
    "generate.depth=1",
]


@dataclass
class Log:
    """What happened. server: the process that all starts are forked from."""

    server: int
    faults: Counter = field(default_factory=Counter)
    codes: Counter = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)  # MB of all processes of a start, once a second
    sessions: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def watch(self, start: Start, seconds: float) -> bool:
        """Let a start run for so long and sample its memory; say whether it still runs."""
        until = time.monotonic() + seconds
        self.sessions |= set(start.pids)
        while (left := until - time.monotonic()) > 0:
            if start.ended(min(1.0, left)):
                return False
            if time.monotonic() - start.began > SETTLED:
                self.memory.append(megabytes(start, self.server))
        return True

    def quarters(self) -> tuple[float, float]:
        """Usual memory in the first and in the last quarter, in MB."""
        size = max(1, len(self.memory) // 4)
        return median(self.memory[:size] or [0]), median(self.memory[-size:] or [0])


def soak(launcher: Launcher, command: list, run: Path, steps: int, *, seconds: float, gap: float, scene: dict) -> Log:
    """The run from start to end, harmed until the time is over."""
    log, deadline, codes = Log(launcher.server.pid), time.monotonic() + seconds, []
    while codes != [0] * RANKS:
        left = steps - (latest_step(run / "checkpoints") or 0)
        pace = max(0.0, deadline - time.monotonic()) / max(1, left)
        start, kinds = launcher.start(run, [*command, f"run={run}"], ranks=RANKS, FAULTS_PACE=pace), []
        while log.watch(start, scene["draws"].uniform(0, 2 * gap)):
            if time.monotonic() < deadline:
                kinds += harm(start, log, scene)
        codes = start.wait()
        judge(start, kinds, log)
    return log


def harm(start: Start, log: Log, scene: dict) -> list[str]:
    """One fault; its kind, where it could be done."""
    kind = scene["draws"].choice(list(FAULTS))
    fault = FAULTS[kind]
    if not fault.do(Scene(start=start, **scene)):
        return []
    log.faults[kind] += 1
    if fault.seconds is not None and not start.ended(fault.seconds):
        log.problems.append(f"{kind}: the start goes on for {fault.seconds} s")
        start.kill()
    return [kind]


def judge(start: Start, kinds: list[str], log: Log) -> None:
    """Note how a start ended, and complain where no fault explains it."""
    log.codes[f"{kinds[-1] if kinds else 'nothing'}: {sorted(start.codes)}"] += 1
    own = {0}.union(*(FAULTS[kind].codes for kind in kinds))
    hit = set(start.codes) & (own - {0})
    if not (set(start.codes) == {0} or (hit and set(start.codes) <= own | PEER)):
        log.problems.append(f"exit codes {start.codes} after {kinds or 'nothing'}\n{start.printed()[-1500:]}")


def megabytes(start: Start, server: int) -> float:
    """10^6 bytes of a start's processes and their workers, without what the fork server gave each of them."""
    total, given = 0, _anonymous(psutil.Process(server))
    for pid in start.pids:
        try:
            parent = psutil.Process(pid)
            total += sum(max(0, _anonymous(process) - given) for process in (parent, *parent.children(recursive=True)))
        except psutil.NoSuchProcess:
            continue  # it ends just now
    return total / 1e6


def _anonymous(process: psutil.Process) -> int:
    """Return bytes in memory that are no file's, those shared since a fork included, which do not grow when touched."""
    memory = process.memory_info()
    return memory.rss - memory.shared


def left_behind(sessions: set[int]) -> list[psutil.Process]:
    """Return processes of finished starts, after they had time to notice."""
    deadline = time.monotonic() + 15
    while True:
        strays = [process for process in psutil.process_iter() if _session(process) in sessions]
        if not strays or time.monotonic() > deadline:
            return strays
        time.sleep(0.5)


def _session(process: psutil.Process) -> int | None:
    """The session of a process; None for one that has ended and for the kernel's own."""
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getsid(process.pid)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


def draw_shards(folder: Path) -> list[Path]:
    """The four training shards of the tests, the bytes of one image overwritten."""
    write_shards(folder / "pictures", folder / "shards")
    shards = sorted((folder / "shards").glob("train-*.tar"))
    whole = shards[0].read_bytes()
    at = whole.index(b"\x89PNG")
    shards[0].write_bytes(whole[:at] + b"damaged!" + whole[at + 8 :])
    return shards


def main(folder: Path, *, minutes: float, seed: int, gap: float) -> list[str]:
    """Everything; returns what went wrong."""
    shards, steps, launcher = draw_shards(folder), round(STEPS_A_MINUTE * minutes), Launcher(folder)
    epochs = steps * BATCH / IMAGES
    config = folder / "tiny.yaml"
    config.write_text(CONFIG.format(shards=folder / "shards", epochs=epochs, pictures=epochs / 40))
    tool, run, whole = ["tools/pretrain.py", config], folder / "run", folder / "whole"
    launcher.start(folder / "teacher", [*tool, f"run={folder}/teacher", "method=mae", "optim.epochs=2"]).finish()
    command = [*tool, *AMD, f"teacher.source=run:{folder}/teacher"]

    print(f"seed {seed}: {steps} steps in one piece, then for {minutes:g} minutes with faults", flush=True)
    quiet = Log(launcher.server.pid)
    start = launcher.start(whole, [*command, f"run={whole}"], ranks=RANKS)
    while quiet.watch(start, 60):
        pass
    start.finish()
    newest = whole / "checkpoints" / f"step_{steps:09d}"
    scene = {
        "shards": shards,
        "room": (newest / "optimizer.safetensors").stat().st_size // 2,
        "draws": random.Random(seed),
    }
    log = soak(launcher, command, run, steps, seconds=60 * minutes, gap=gap, scene=scene)
    report(log, quiet)

    strays = left_behind(quiet.sessions | log.sessions)
    log.problems += [f"stray process {process}" for process in strays]
    for process in strays:
        process.kill()
    launcher.close()
    expected = {"pictures", "shards", "tiny.yaml", "teacher", "run", "whole"}
    files = [
        path.name for path in folder.iterdir() if path.name not in expected and path.suffix not in (".out", ".err")
    ]
    files += [path.name for path in Path("/dev/shm").iterdir() if any(f"_{pid}_" in path.name for pid in log.sessions)]
    log.problems += [f"temporary file {name}" for name in files]
    try:
        same_result(run, whole)
    except AssertionError as error:
        log.problems.append(f"the result differs: {error}")
    digest = hashlib.sha256(b"".join((newest / name).read_bytes() for name in WEIGHTS)).hexdigest()[:16]
    print(f"left behind: {len(strays)} processes, {len(files)} files; result of the run in one piece: {digest}")
    return log.problems


def report(log: Log, quiet: Log) -> None:
    """Print what happened, and complain of memory that grew."""
    print(f"{log.faults.total()} faults: " + ", ".join(f"{count} {kind}" for kind, count in sorted(log.faults.items())))
    print("ended by:\n" + "\n".join(f"  {count:4d} x {code}" for code, count in sorted(log.codes.items())))
    for name, one in (("in one piece", quiet), ("with faults", log)):
        first, last = one.quarters()
        print(f"memory {name}: {first:.1f} MB in the first quarter, {last:.1f} in the last")
        if last > first + GROWTH:
            log.problems.append(f"memory {name} grew from {first:.1f} to {last:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--gap", type=float, default=8.0, help="mean seconds between faults")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        wrong = main(Path(place), **vars(arguments))
    print("\n".join(["went wrong:", *wrong]) if wrong else "nothing went wrong")
    sys.exit(bool(wrong))
