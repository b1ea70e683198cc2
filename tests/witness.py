"""tools/pretrain.py under observation: the same arguments, the same run, and notes of what the network was given.

RUN/witness-RANK.jsonl gets one line per micro-batch: the positions, the samples, a checksum of each image as the
network reads it, each sample's patch order and where it is cut. RUN/features-RANK.pt gets what the first kNN compares.
WITNESS_KILL=N kills the process with SIGKILL in the middle of its N-th micro-batch. ZeRO 3 cuts up even the small
tensors of a tiny model here, which it would leave whole.
"""

import hashlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maedistill import pretrain
from maedistill.data.loader import Batch
from maedistill.training import engine as engine_file
from maedistill.training.distributed import rank


class Witness:
    """Stands between the loop and its loader, its engine and its probe."""

    def __init__(self, run: Path, kill_at: int) -> None:
        self.run, self.kill_at, self.seen = run, kill_at, 0
        self.batch: Batch | None = None
        self.features: list[tuple[Tensor, Tensor]] = []
        self.originals = pretrain.training_batches, engine_file.Engine.__call__, pretrain.pooled_features

    def training_batches(self, *args: Any, **keywords: Any) -> Iterator[Batch]:
        """The loader's micro-batches, each remembered."""
        for batch in self.originals[0](*args, **keywords):
            self.batch = batch
            yield batch

    def forward(self, engine: Any, images: Tensor, split: Any, target: Any) -> dict[str, Tensor]:
        """The engine's forward pass, its inputs noted."""
        note = {
            "positions": self.batch.positions.tolist(),
            "samples": self.batch.samples.tolist(),
            "images": [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images],
            "orders": split.order.tolist(),
            "seen": [[split.num_student, split.num_teacher]] * len(images),
        }
        with (self.run / f"witness-{rank()}.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        self.seen += 1
        if self.seen == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.originals[1](engine, images, split, target)

    def pooled_features(self, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        """The probe's features and labels, those of the first kNN kept in a file."""
        self.features.append(self.originals[2](*args, **keywords))
        if len(self.features) == 2:  # training images, then validation images
            torch.save(self.features, self.run / f"features-{rank()}.pt")
        return self.features[-1]


if __name__ == "__main__":
    run = next(argument for argument in sys.argv if argument.startswith("run=")).removeprefix("run=")
    witness = Witness(Path(run), int(os.environ.get("WITNESS_KILL", "0")))
    pretrain.training_batches, pretrain.pooled_features = witness.training_batches, witness.pooled_features
    engine_file.Engine.__call__ = lambda engine, *inputs: witness.forward(engine, *inputs)
    engine_file.WHOLE = 0
    runpy.run_path(str(Path(__file__).parent.parent / "tools" / "pretrain.py"), run_name="__main__")
