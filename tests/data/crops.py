"""Random crops of 16 px of an index, and how one rank loads them."""

import time

import pytest
import torch

from maedistill.config.plan import batch_plan
from maedistill.data.loading.loader import RandomCrops
from maedistill.data.loading.order import SampleOrder
from maedistill.errors import UserError


def crops_of(index, *, seed=5, augment=None, kept=None, **order) -> RandomCrops:
    """Crops in an order. kept: the decoded images that are kept."""
    order = SampleOrder(index.starts, seed=seed, **order)
    crops = RandomCrops(index, order, seed=seed, size=16, scale=(0.2, 1.0), ratio=(0.75, 4 / 3), augment=augment)
    crops.reader.kept = kept
    return crops


def one_rank(batch) -> dict:
    """Keywords of `training_batches` for one process, whose micro-batch is the whole batch."""
    return {"plan": batch_plan(batch, batch, world_size=1), "rank": 0, "world_size": 1, "device": torch.device("cpu")}


def failure(batches) -> tuple[UserError, int, float]:
    """Return the error that ends batches, without the traceback, which keeps workers alive; their number; seconds."""
    began, count = time.monotonic(), 0
    try:
        for _ in batches:
            count += 1
    except UserError as error:
        return error.with_traceback(None), count, time.monotonic() - began
    pytest.fail("there was no error")
