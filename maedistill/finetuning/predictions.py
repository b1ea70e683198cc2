"""Stored predictions as teacher: what the network in training predicted for each image an epoch ago.

    RUN/predictions/epoch_000003.f16    row i: probabilities that the step's own forward pass gave sample i in epoch 3,
                                        of all classes, or of the `top_k` likeliest with the numbers of these classes

In the next epoch they are mixed into the sample's target (PS-KD, Kim et al., ICCV 2021). Each rank writes the rows of
its own samples. A step reads a file only if it was complete before the step. So what a row reads depends on the step
alone, and a restart, which writes the rows since its checkpoint again, reads the same:

    positions   | epoch 0        | epoch 1             | epoch 2
    steps       |    |    |    |    |    |    |    |    |
    read        | nothing           | epoch 0's        | epoch 1's     rows of a step beyond its first epoch: nothing

B batch   C classes   k classes of a row
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from maedistill.config.distill import PastConfig
from maedistill.config.plan import Plan
from maedistill.data.loading.batch import Batch
from maedistill.data.loading.order import SampleOrder
from maedistill.durable import make_folder, sync
from maedistill.errors import ConfigError, DataError
from maedistill.finetuning.outputs import Outputs
from maedistill.processes import distributed
from maedistill.runs.checkpoint import checkpoint_steps
from maedistill.runs.history import size_text
from maedistill.runs.run import Run


class Predictions:
    """The files of predictions: this rank's rows of an epoch go in, those of the epoch before come out."""

    def __init__(self, section: PastConfig, *, plan: Plan, epochs: float, samples: int, num_classes: int) -> None:
        """Set up without files. epochs: of the run; samples: in the shards, of which a run may train on a part."""
        if section.top_k is not None and 3 * section.top_k >= num_classes:  # each takes three times the bytes
            cause = f"distill.past.top_k: {section.top_k} of {num_classes} classes take no less disk than all of them"
            raise ConfigError(cause, "use less than a third of the classes, or null to store all of them")
        self.section, self.plan, self.epochs, self.num_classes = section, plan, epochs, num_classes
        k = section.top_k or num_classes
        fields: list[Any] = [("probabilities", "<f2", (k,)), ("classes", "<i4", (k,))]
        self.row, self.shape = np.dtype(fields[: 2 if section.top_k else 1]), (samples,)
        self._folder, self._order, self._saved = Path(), cast(SampleOrder | None, None), 0  # until `begin`
        self._epoch = -1  # in which the current step begins
        self._past: np.ndarray | None = None  # the rows of the epoch before it, [samples]
        self._pending: tuple[Tensor, list[Tensor], torch.cuda.Event | None] | None = None  # samples, values, copied
        self._files: dict[int, int] = {}  # open for writing, by epoch

    def describe(self) -> str:
        """Return the line for the start of a run: the disk space."""
        return (
            f"past     predictions: {size_text(self.shape[0] * self.row.itemsize)} per epoch in RUN/predictions; "
            "two epochs are kept, and two more for each checkpoint of an earlier epoch"
        )

    def begin(self, run: Run, order: SampleOrder) -> None:
        """Start before the run's next step. Collective. Raises DataError if predictions that it needs are not there."""
        self._folder, self._checkpoints = run.folder.path / "predictions", run.folder.checkpoints
        self._order, self._saved = order, run.step
        distributed.on_main(lambda: self._prepare(run.step))
        if not all(distributed.gather_objects(self._folder.is_dir())):
            cause = f"{self._folder}, which rank 0 has made, is not visible to every rank"
            raise DataError(cause, "use a run= on a disk that all machines share, or distill.past.source=weights")
        run.before_save.append(self.sync)

    def outputs(self, images: Tensor, step: int, *, batch: Batch | None, now: nn.Module) -> Outputs:
        """Return predictions [B, C] and their share of the targets [B, 1] for a micro-batch on the device.

        The share is 0 for a prediction that is missing or not finite. In the first epoch there are none. Collective in
        the first step of an epoch.
        """
        if self._order is None:  # a dry run
            return {}
        assert batch is not None
        epoch = self.plan.epoch_of(step)
        if epoch != self._epoch:
            self._begin_epoch(epoch, step)
        if self._past is None:
            return {}
        rows, device = self._past[batch.samples.numpy()], batch.positions.device
        stored = past = _to_device(rows["probabilities"], device).float()  # [B, k]
        mass = stored.sum(dim=1, keepdim=True)  # [B, 1]
        valid = mass.isfinite() & (mass > 0) & (batch.positions // self.plan.images == epoch)[:, None]
        if self.section.top_k:
            classes = _to_device(rows["classes"], device).long().clamp(0, self.num_classes - 1)
            rest = (1 - mass).clamp(min=0) / (self.num_classes - self.section.top_k)
            past = rest.expand(-1, self.num_classes).scatter(1, classes, stored)
        past = torch.where(valid, past / past.sum(dim=1, keepdim=True), 0)  # rows of fp16 sum to about 1
        return {"past": past, "share": valid * self.section.share_at(epoch, self.epochs)}

    def add(self, batch: Batch, losses: dict[str, Tensor]) -> None:
        """Take the network's probabilities [B, C] for a micro-batch out of its losses.

        They are written in the next call: the device computes on while the host waits for the copy.
        """
        self._write()
        predictions = losses.pop("predictions")
        top: Any = predictions.topk(self.section.top_k) if self.section.top_k else (predictions,)
        values = [_to_host(value) for value in (batch.positions, top[0].half(), *top[1:])]
        copied = torch.cuda.Event(blocking=True) if predictions.is_cuda else None
        if copied is not None:
            copied.record()
        self._pending = batch.samples, values, copied

    def sync(self, step: int) -> None:
        """Get all rows onto the disk, before a checkpoint of `step` that counts on them. Collective."""
        self._saved = step
        self._write()
        with self._disk():
            for file in self._files.values():
                os.fsync(file)
            sync(self._folder)
        distributed.barrier()

    def _begin_epoch(self, epoch: int, step: int) -> None:
        """Open what the epoch before predicted, and remove what no start needs any more. Collective."""
        self._epoch, self._past = epoch, None  # closed on every rank before it may be removed
        self.sync(self._saved)
        distributed.on_main(lambda: self._remove_all_but({step, self._saved}))
        for old in [old for old in self._files if old < epoch]:
            os.close(self._files.pop(old))
        if epoch and self._is_stored(epoch - 1):
            with self._disk():
                self._past = np.memmap(self._path(epoch - 1), self.row, "r", shape=self.shape)

    def _write(self) -> None:
        """Write the rows of the micro-batch before."""
        if self._pending is None:
            return
        assert self._order is not None
        (samples, (positions, *values), copied), self._pending = self._pending, None
        if copied is not None:
            copied.synchronize()
        rows = np.empty(len(samples), self.row)
        for name, value in zip(self.row.names or (), values, strict=True):
            rows[name] = value.numpy()
        planned, epochs = self._order.samples(positions).tolist(), (positions // self.plan.images).tolist()
        for row, sample, epoch, own in zip(rows, samples.tolist(), epochs, planned, strict=True):
            # A sample in place of a damaged one has its own turn, maybe on another rank.
            if sample == own and self._is_stored(epoch):
                self._write_row(row.tobytes(), sample, epoch)

    def _write_row(self, row: bytes, sample: int, epoch: int) -> None:
        """Write one row. A file has its full size at once: rows not yet written are zeros, and take no space."""
        with self._disk():
            if epoch not in self._files:
                self._files[epoch] = os.open(self._path(epoch), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
                os.ftruncate(self._files[epoch], self.shape[0] * len(row))
            if os.pwrite(self._files[epoch], row, sample * len(row)) < len(row):
                raise OSError("the disk is full")

    def _prepare(self, step: int) -> None:
        """Make the folder. Raises DataError unless the files that a start before `step` needs are whole."""
        with self._disk():
            make_folder(self._folder)
            size = self.shape[0] * self.row.itemsize
            for path in map(self._path, sorted(self._needed(step)) if step < self.plan.steps else ()):
                found = path.stat().st_size if path.is_file() else 0
                if found != size:
                    cause = f"{path} has {found:,} of {size:,} bytes, and step {step} continues with its predictions"
                    raise DataError(cause, "restore it from a copy, or start over with --fresh or another run=")

    def _needed(self, step: int) -> set[int]:
        """Return the epochs whose predictions of the steps before `step` are read from there on."""
        epoch, within = divmod(step * self.plan.global_batch, self.plan.images)
        return {past for past in (epoch - 1, epoch if within else -1) if past >= 0 and self._is_stored(past)}

    def _is_stored(self, epoch: int) -> bool:
        """Return whether the term is on somewhere in the next epoch, which reads this one."""
        start, stop = self.section.start_epoch, self.section.stop_epoch
        return start < epoch + 2 and (stop is None or stop > epoch + 1)

    def _remove_all_but(self, steps: set[int]) -> None:
        """Remove the files that neither these steps nor the checkpoints need."""
        steps = steps | {step for step, _ in checkpoint_steps(self._checkpoints)}
        needed = {self._path(epoch) for step in steps for epoch in self._needed(step)}
        with self._disk():
            for path in set(self._folder.glob("epoch_*.f16")) - needed:
                path.unlink()

    def _path(self, epoch: int) -> Path:
        return self._folder / f"epoch_{epoch:06d}.f16"

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Raise DataError for what the disk refuses."""
        try:
            yield
        except OSError as error:
            cause = f"predictions cannot be kept in {self._folder} ({error})"
            remedy = "free disk space or correct the permissions there; the same command continues the run"
            raise DataError(cause, remedy) from error


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device; to a GPU from pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _to_host(value: Tensor) -> Tensor:
    """Begin a copy from a GPU to the host."""
    if not value.is_cuda:
        return value
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
