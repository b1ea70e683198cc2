"""A training tool under observation: the same arguments, the same run, and notes of what the network was given.

    python tests/support/witness.py tools/pretrain.py CONFIG run=RUN ...

RUN/witness-RANK.jsonl gets one line per micro-batch: the positions, the samples, a checksum of each uint8 crop and of
each image as the network reads it, the learning rate of each parameter group; in pre-training each sample's patch order
and where it is cut, in fine-tuning the targets. RUN/features-RANK.pt gets what the first kNN compares.
WITNESS_KILL=N kills the process with SIGKILL in the middle of its N-th micro-batch, when the checkpoint that the run
writes meanwhile, if any, is complete: a test knows which one is the last. WITNESS_NAN=P,Q,... makes the
images at these positions nan. WITNESS_PACE=S makes each micro-batch take S seconds more, and then nothing is noted.
ZeRO 3 cuts up even the small tensors of a tiny model here, which it would leave whole.
"""

import hashlib
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from maedistill.data.loading.loader import Batch
from maedistill.models.masking import PatchSplit
from maedistill.processes.distributed import rank
from maedistill.runs import async_saver
from maedistill.runs import run as run_file
from maedistill.training import engine as engine_file

STAGES = {"pretrain": "maedistill.pretraining.loop", "finetune": "maedistill.finetuning.loop"}


class Witness:
    """Stands between the loop in `stage` (a module of STAGES) and its loader, its engine and its probe."""

    def __init__(self, stage: ModuleType, run: Path, kill_at: int, nan_at: set[int]) -> None:
        self.run, self.kill_at, self.nan_at, self.seen = run, kill_at, nan_at, 0
        self.batch: Batch | None = None
        self.features: list[tuple[Tensor, Tensor]] = []
        self.load, self.compute = run_file.training_batches, engine_file.Engine.__call__
        run_file.training_batches = self.training_batches
        engine_file.Engine.__call__ = lambda engine, *inputs: self.forward(engine, *inputs)
        if hasattr(stage, "pooled_features"):
            self.pool, stage.pooled_features = stage.pooled_features, self.pooled_features

    def training_batches(self, *args: Any, **keywords: Any) -> Iterator[Batch]:
        """The loader's micro-batches, each remembered."""
        for batch in self.load(*args, **keywords):
            self.batch = batch
            yield batch

    def forward(self, engine: Any, images: Tensor, *more: Any) -> dict[str, Tensor]:
        """The engine's forward pass, its inputs noted."""
        if pace := os.environ.get("WITNESS_PACE"):
            time.sleep(float(pace))
            return self.compute(engine, images, *more)
        note = {
            "positions": self.batch.positions.tolist(),
            "samples": self.batch.samples.tolist(),
            "crops": checksums(self.batch.images),
            "images": checksums(images),
            "rates": [group["lr"] for group in engine.optimizer.param_groups],
        }
        if isinstance(more[0], PatchSplit):
            split = more[0]
            cuts = [split.num_student, split.num_teacher]
            note |= {"orders": split.order.tolist(), "seen": [cuts] * len(images)}
        else:
            note |= {"targets": more[0].tolist()}
        with (self.run / f"witness-{rank()}.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        self.seen += 1
        if self.seen == self.kill_at:
            for thread in threading.enumerate():
                if isinstance(thread, async_saver._Writing):
                    thread.join()
            os.kill(os.getpid(), signal.SIGKILL)
        for row, position in enumerate(self.batch.positions.tolist()):
            if position in self.nan_at:
                images[row] = torch.nan
        return self.compute(engine, images, *more)

    def pooled_features(self, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        """The probe's features and labels, those of the first kNN kept in a file."""
        self.features.append(self.pool(*args, **keywords))
        if len(self.features) == 2 and "WITNESS_PACE" not in os.environ:  # training images, then validation images
            torch.save(self.features, self.run / f"features-{rank()}.pt")
        return self.features[-1]


def checksums(images: Tensor) -> list[str]:
    """One for each image."""
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]


if __name__ == "__main__":
    name = next(argument for argument in sys.argv if argument.startswith("tools/"))  # deepspeed puts its own first
    sys.argv.remove(name)
    tool = Path(__file__).resolve().parents[2] / name
    run = next(argument for argument in sys.argv if argument.startswith("run=")).removeprefix("run=")
    stage = importlib.import_module(STAGES[tool.stem])
    nan_at = {int(position) for position in os.environ.get("WITNESS_NAN", "").split(",") if position}
    Witness(stage, Path(run), int(os.environ.get("WITNESS_KILL", "0")), nan_at)
    engine_file.PERSISTENCE_THRESHOLD = 0
    runpy.run_path(str(tool), run_name="__main__")
