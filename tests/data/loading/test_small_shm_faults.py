"""Loader workers where /dev/shm has no room, cannot be written to, or is no folder: they need nothing of it."""

import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from maedistill.data.loading.fork_context import ForkLock
from tests.data.tar_files import encode, write_tar

LOADS = """
import subprocess, sys, torch
from maedistill.config.plan import batch_plan
from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform, exact_batches
from maedistill.data.loading.loader import RandomCrops, training_batches
from maedistill.data.loading.order import SampleOrder
from maedistill.data.shards.open_index import open_index

index = open_index(sys.argv[1])
images = EvaluationImages(index, torch.arange(64), evaluation_transform(size=224, crop=1.0))
crops = RandomCrops(index, SampleOrder(index.starts, seed=5), seed=5, size=16, scale=(1, 1), ratio=(1, 1))
one_rank = {"plan": batch_plan(16, 16, world_size=1), "rank": 0, "world_size": 1, "device": torch.device("cpu")}
for options in ("size=64k", "ro"):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", "/dev/shm"], check=True)
    exact = exact_batches(images, batch=16, workers=8, timeout_seconds=30)
    random = training_batches(crops, 0, 2, workers=8, timeout_seconds=30, **one_rank)
    print(options, sum(len(ids) for _, _, ids in exact), sum(len(batch.images) for batch in random))
"""


def test_eight_workers_need_nothing_in_dev_shm(tmp_path):
    """Docker gives 64 MB; torch's own transport takes a file for each tensor, and 128 KB of semaphores."""
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("a mount namespace needs root and unshare")
    image = encode(Image.new("RGB", (40, 40), (9, 99, 199)), "PNG")
    shard = write_tar(tmp_path / "a.tar", {f"{i:03d}.png": image for i in range(64)})
    command = ["unshare", "-m", sys.executable, "-c", LOADS, str(shard)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.splitlines()[0]}")
    assert done.stdout.splitlines() == ["size=64k 64 32", "ro 64 32"], done.stderr


def test_the_lock_excludes_other_processes():
    lock = ForkLock()
    with lock:
        assert not lock.acquire(False) and not lock.acquire(True, 0.01)
        child = os.fork()
        if not child:
            os._exit(int(lock.acquire(True, 0.01)))
        assert os.waitpid(child, 0)[1] == 0
    child = os.fork()
    if not child:
        os._exit(int(lock.acquire(True, 60)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert not lock.acquire(False)  # the child took it
    lock.release()
    assert lock.acquire()
