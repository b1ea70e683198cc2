"""A real run, continued from copies of its checkpoint that each lack one saved item or have it changed.

The items are found in the checkpoint itself, so that one which is added some day is tried as well. Everything that
the run keeps is made to matter: counters are not what a new run begins with, and some updates are not finite, in fp32
those before and after the checkpoint. The clock ticks once per look, so that even seconds repeat.
"""

import hashlib
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import UserError
from maedistill.pretraining import loop as pretrain
from maedistill.pretraining.setup import open_pretraining
from maedistill.runs import clock, metrics
from maedistill.runs.async_saver import Saver
from maedistill.runs.folder import RunFolder
from maedistill.runs.manifest import COMPLETE, MANIFEST
from maedistill.runs.nonfinite import NonfinitePolicy
from maedistill.runs.previous import CONFIG, METADATA
from maedistill.runs.progress import Progress
from maedistill.runs.run import Run
from maedistill.runs.start import start_run
from tests.support.checkpoints import renew_manifest

SETTINGS = ["method=mae", "optim.ema=0.9", "optim.epochs=2", "engine.max_nonfinite=2"]
SETTINGS += ["log.pictures_every_epochs=null", "log.knn_every_epochs=null"]
SPOILED = {"fp32": (7, 8), "fp16": (3,)}  # steps; the checkpoint is that of step 8
ALONE = SimpleNamespace(beat=lambda step: None, paused=nullcontext)  # stands for the other ranks
MIDDLE, END = "step_000000008", "step_000000016"


def endings(folder: Path, precision: str) -> dict[str, str]:
    """{"uninterrupted", "continued", "FILE gone", "ITEM gone", "ITEM changed": what the run came to}.

    A run comes to a hash of its weights and averages, and one of its last state.json; or to the error that ended it.
    """
    arguments = [*SETTINGS, f"run={folder / precision}", f"engine.precision={precision}"]
    config = load_config(folder / "tiny.yaml", arguments, root=PretrainConfig).config
    with redirect_stdout(sys.stderr):
        parts = open_pretraining(config, world_size=1, device=torch.device("cpu"))
        run = start_run(parts, RunFolder(config.run), ALONE, fresh=True, extend=False)
        spoil(run, SPOILED[precision])
        blank = run.engine.state(), {name: value.clone() for name, value in run.ema.module.state_dict().items()}
        original = run.folder.checkpoints
        run.progress.bad_samples, run.progress.nonfinite = 3, 2
        train(run, parts)
        found = {"uninterrupted": outcome(original / END)}
        for name, change in {"continued": lambda checkpoint: None, **changes(original / MIDDLE)}.items():
            forget(run, folder / f"{precision}-{len(found)}", *blank)
            copy = run.folder.checkpoints / MIDDLE
            shutil.copytree(original / MIDDLE, copy)
            change(copy)
            renew_manifest(copy)
            try:
                run.restore()
                train(run, parts)
                found[name] = outcome(run.folder.checkpoints / END)
            except UserError as error:
                found[name] = f"refused: {error.cause}"
    return found


def train(run: Run, parts: Any) -> None:
    """The loop itself, its clock replaced."""
    tick = SimpleNamespace(perf_counter=map(float, itertools.count()).__next__)
    clock.time = tick
    run.clock.restart()
    pretrain.train(run, parts)
    run.saver.close()


def spoil(run: Run, steps: tuple[int, ...]) -> None:
    """Make the losses of some steps nan."""
    backward = run.engine.backward
    run.engine.backward = lambda loss: backward(loss * math.nan if run.step in steps else loss)


def forget(run: Run, checkpoints: Path, training: Any, averages: dict[str, torch.Tensor]) -> None:
    """Make the run a new one, in a folder of its own: what a restart does not load, it does not have."""
    run.folder.checkpoints, run.saver = checkpoints, Saver(checkpoints, keep=9)
    run.progress, run.clock, run.averages = Progress(), clock.Clock(torch.device("cpu")), metrics.Averages()
    most = run.config.engine.max_nonfinite
    run.nonfinite = NonfinitePolicy(run.folder.nonfinite, most=most, sample_names=run.nonfinite.sample_names)
    run.engine.load_state(training)
    run.ema.module.load_state_dict(averages)


def outcome(checkpoint: Path) -> str:
    weights = hashlib.sha256()
    for kind in ("model", "ema"):
        weights.update((checkpoint / f"{kind}.safetensors").read_bytes())
    return f"{weights.hexdigest()} {(checkpoint / 'state.json').read_text()}"


def changes(checkpoint: Path) -> dict[str, Callable[[Path], None]]:
    """Every file, every value of state.json, and one tensor of each kind."""
    copies = (CONFIG, METADATA)  # they count only where the run's own are lost: tests/faults/test_power_cut.py
    files = sorted(path.name for path in checkpoint.iterdir() if path.name not in (MANIFEST, COMPLETE, *copies))
    found = {f"{file} gone": partial(remove, file) for file in files}
    for file, key in itertools.chain.from_iterable(keys(checkpoint / file) for file in files):
        for how, edit in (("gone", lambda holder, key: holder.pop(key)), ("changed", add_one)):
            found[f"{file} {'/'.join(key)} {how}"] = partial(rewrite, file, key, edit)
    return found


def remove(file: str, checkpoint: Path) -> None:
    (checkpoint / file).unlink()


def keys(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(file, where in it) of the items of one file."""
    if path.suffix == ".json":
        yield from ((path.name, key) for key in leaves(json.loads(path.read_text())))
        return
    for _, names in itertools.groupby(sorted(load_file(path)), lambda name: name.rpartition("/")[0]):
        names = list(names)
        yield path.name, (names[len(names) // 2],)


def leaves(tree: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield from ((key, *rest) for rest in leaves(value)) if isinstance(value, dict) else [(key,)]


def rewrite(file: str, key: tuple[str, ...], edit: Callable, checkpoint: Path) -> None:
    """Edit one item of a file."""
    path = checkpoint / file
    content = json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
    holder = content
    for step in key[:-1]:
        holder = holder[step]
    edit(holder, key[-1])
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        save_file(content, path)


def add_one(holder: dict[str, Any], key: str) -> None:
    holder[key] = holder[key] + 1
