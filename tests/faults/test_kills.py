"""SIGKILL at random instants: each restart goes on with the same samples and ends with the same bits.

    MAEDISTILL_KILLS=100 MAEDISTILL_SEED=7 pytest tests/faults/test_kills.py

Six runs are killed: AMD pre-training with its teacher and a moving average, fine-tuning with everything random on, AMD
on two ranks, of which one is killed, mutual learning, a network that learns from its exits, blocks and past weights,
and one that learns from its stored predictions. Pairs of runs are killed in tests/test_codistillation.py. Saving every
second step and a disk that takes a while for each fsync put many of the instants inside a checkpoint write. A run that
ends before its kill is checked, and the next one begins.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.harm import PEER
from tests.faults.notes import Notes, same_result
from tests.support.launch import WITNESS, Start

KILLS = int(os.environ.get("MAEDISTILL_KILLS", "12"))
SEED = int(os.environ.get("MAEDISTILL_SEED", random.SystemRandom().randrange(10**6)))
SHARES = {"pretrain": 0.25, "finetune": 0.15, "two ranks": 0.2, "mutual": 0.13, "self": 0.13, "predictions": 0.14}
SMALL = ["student.model=vit_tiny_patch16_224", "student.width=32", "student.depth=3", "student.num_heads=2"]
SMALL += ["student.patch_size=8", "optim.epochs=2"]
MUTUAL = ['distill.mutual={weight: 1, students: ["", "student.width=48 student.num_heads=3"]}']
SELF = ["student.exits=[0,1]", "distill.exits={weight: 1, own_block: true}", "distill.label_weight=0"]
SELF += ["distill.self_attention={weight: 0.1, blocks: [0,1,2]}", "distill.past.weight=1"]
PREDICTIONS = ["distill.past={weight: 1, source: predictions}", "distill.label_weight=0"]
PREDICTIONS += ["augment.mixup=0", "augment.cutmix=0"]
OFTEN = ["log.save_every_epochs=0.25"]  # every 2 steps
LATEST_KILL = 3.0  # seconds after its start at which a kill that waits for nothing comes at the latest
FSYNC = 0.02  # seconds; a write has nine
KILLS_OF_A_RUN = 15  # kills of one run


def wait_for_instant(start: Start, draws: random.Random) -> None:
    """Return at a random instant in the life of a start, or when it has ended.

    A quarter of the instants fall anywhere, set-up included, a quarter anywhere after the first step, half in one of
    the first checkpoint writes.
    """
    kind = draws.choices(("any", "step", "write"), (1, 1, 2))[0]
    if kind == "any":
        start.ended(draws.uniform(0, LATEST_KILL))
        return
    seen, left = temporary(start.run), draws.randint(1, 3)
    while not start.ended(0.002):
        now = temporary(start.run)
        left, seen = left - len(now - seen), now
        if kind == "write" and left <= 0:
            start.ended(draws.uniform(0, 10 * FSYNC))
            return
        if kind == "step" and list(start.run.glob("witness-*.jsonl")):
            start.ended(draws.uniform(0, 0.4))
            return


def temporary(run: Path) -> set[Path]:
    """Return the checkpoints that are being written or removed, or were when a kill came."""
    return set((run / "checkpoints").glob("*.tmp"))


def what_was_hit(run: Path, *, since: float) -> str:
    """Say what a kill came into: the newest thing that happened to a checkpoint after `since`."""
    complete = {path.name for path in (run / "checkpoints").glob("step_?????????")}
    for path in temporary(run):
        if path.stat().st_mtime > since:
            return "inside a write" if path.stem > max(complete, default="") else "inside a removal"
    return "elsewhere"


def kill_until_done(launcher, run: Path, command: list, reference: Path, *, kills: int, ranks: int, draws) -> Counter:
    """Kill one run at most `kills` times, check its end, and count what happened."""
    happened, notes, codes = Counter(runs=1), Notes(reference), []
    while codes != [0] * ranks:
        happened["restarts that found a .tmp"] += bool(temporary(run))
        slow = {"FAULTS_FSYNC": FSYNC} if draws.random() < 0.75 else {}
        began, victim = time.time(), draws.randrange(ranks)
        start = launcher.start(run, [WITNESS, *command, f"run={run}"], ranks=ranks, **slow)
        if happened["kills"] < kills:
            wait_for_instant(start, draws)
            start.signal(signal.SIGKILL, victim)
        codes = start.wait(grace=2)
        notes.check(start)
        if codes[victim] == -signal.SIGKILL:
            assert set(codes) <= {0, *PEER}, start.printed()[-3000:]  # 0: it had ended before
            happened.update(["kills", what_was_hit(run, since=began)])
            happened.update(f"survivor: {code}" for code in codes[:victim] + codes[victim + 1 :])
        else:
            assert codes == [0] * ranks, start.printed()[-3000:]
    same_result(run, reference)
    return happened


@pytest.fixture(scope="module")
def commands(pretraining, finetuning, settings, mae):
    """Tool, config and settings of each kind of run."""
    amd = ["tools/pretrain.py", pretraining.config, *settings["amd"], *OFTEN]
    tune = ["tools/finetune.py", finetuning.config, f"init.source=run:{mae.run}", *OFTEN]
    alone = ["tools/finetune.py", finetuning.config, *SMALL, *OFTEN]
    return {
        "pretrain": amd,
        "finetune": tune,
        "two ranks": [*amd, "engine.timeout_seconds=30"],
        "mutual": [*alone, *MUTUAL],
        "self": [*alone, *SELF],
        "predictions": [*alone, *PREDICTIONS],
    }


@pytest.fixture(scope="module")
def references(trio, tuned, launcher, commands, tmp_path_factory):
    """The uninterrupted run of each kind; each from one start."""
    folder, runs = tmp_path_factory.mktemp("uninterrupted"), {"pretrain": trio["amd"].run, "finetune": tuned.run}
    for kind, ranks in (("two ranks", 2), ("mutual", 1), ("self", 1), ("predictions", 1)):
        runs[kind] = folder / kind
        launcher.start(runs[kind], [WITNESS, *commands[kind], f"run={runs[kind]}"], ranks=ranks).finish()
    return runs


@pytest.mark.parametrize("kind", SHARES)
def test_a_run_killed_at_random_instants_ends_with_the_same_bits(
    launcher, commands, references, tmp_path, capsys, kind
):
    with capsys.disabled():
        print(f"\n{kind}: MAEDISTILL_SEED={SEED} MAEDISTILL_KILLS={KILLS} repeats the draws")
    kills, draws = max(1, round(SHARES[kind] * KILLS)), random.Random(f"{SEED} {kind}")
    happened, began = Counter(), time.time()
    while happened["kills"] < kills:
        run, most = tmp_path / f"run-{happened['runs']}", min(kills - happened["kills"], KILLS_OF_A_RUN)
        ranks = 2 if kind == "two ranks" else 1
        happened += kill_until_done(
            launcher, run, commands[kind], references[kind], kills=most, ranks=ranks, draws=draws
        )
        shutil.rmtree(run)
    rate = 60 * happened["kills"] / (time.time() - began)
    with capsys.disabled():
        print(f"{kind}: {rate:.0f} kills a minute, {dict(happened)}")
