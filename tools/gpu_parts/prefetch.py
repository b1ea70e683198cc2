"""Check that batches copied from pinned memory while the GPU computes are correct and are not overwritten early."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_parts.check import Check
from gpu_parts.networks import tiny_config
from gpu_parts.pictures import small_shards
from maedistill.config.plan import BatchPlan
from maedistill.data.loading.batch import Batch
from maedistill.data.loading.loader import RandomCrops, training_batches
from maedistill.data.shards.open_index import open_index
from maedistill.pretraining.build import build_crops

STEPS, PLAN = 60, BatchPlan(micro_batch=12, accumulation=1)
WORKERS = (0, 3)


def run(check: Check) -> None:
    """Keep the GPU busy while batches arrive, and compare each batch with the CPU's."""
    shards = small_shards(check.work / check.part)
    config = tiny_config("mae", ["data.image_size=32", f"data.train={shards}/train-*.tar"])
    crops = build_crops(config, open_index(config.data.train))
    expected = [_tensors(batch) for batch in _batches(crops, torch.device("cpu"), workers=0)]
    for workers in WORKERS:
        found = _under_load(check, crops, workers=workers)
        wrong = [
            number
            for number, (one, other) in enumerate(zip(found, expected, strict=False))
            if not all(torch.equal(tensor.cpu(), right) for tensor, right in zip(one, other, strict=True))
        ]
        good = not wrong and len(found) == len(expected) == STEPS
        check.verdict(f"{workers} workers", good, f"{len(found)} batches, wrong are {wrong[:5] or 'none'}")


def _under_load(check: Check, crops: RandomCrops, *, workers: int) -> list[list[Tensor]]:
    """Read each batch behind a long queue of GPU work, so that copies of later batches have started by then."""
    side = 64 if check.tiny else 4096
    x, found = torch.randn(side, side, device=check.device), []
    for batch in _batches(crops, check.device, workers=workers):
        for _ in range(6):
            x = (x @ x).tanh()
        found.append(_tensors(batch))
        del batch  # frees its memory for the batch after the next one
    check.wait()
    return found


def _batches(crops: RandomCrops, device: torch.device, *, workers: int) -> Iterator[Batch]:
    """Return an iterator over the batches of a run."""
    return training_batches(crops, 0, STEPS, plan=PLAN, rank=0, world_size=1, workers=workers, device=device)


def _tensors(batch: Batch) -> list[Tensor]:
    """Copy the tensors of a batch that training reads."""
    return [batch.images.clone(), batch.positions.clone(), batch.labels.clone()]
