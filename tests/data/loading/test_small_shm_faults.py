"""Loader workers where /dev/shm has no room or cannot be written to: they need nothing of it."""

import ctypes
import subprocess

import pytest
import torch
from PIL import Image

from maedistill.data.loading.decoded_cache import keep_decoded
from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform, exact_batches
from maedistill.data.loading.fork_context import ForkLock
from maedistill.data.loading.loader import training_batches
from maedistill.data.shards.open_index import open_index
from tests.data.crops import crops_of, one_rank
from tests.data.pictures import encode
from tests.data.tar_files import write_tar
from tests.support.forked import exit_code, fork

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),  # torch's own threads
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more workers than cores
]
NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
DONE, NOT_PERMITTED = 0, 3


def load(index, options):
    """Load with 16 workers where /dev/shm is mounted with these options. Run in a process of its own: it changes."""
    if ctypes.CDLL(None).unshare(NEW_MOUNTS):
        return NOT_PERMITTED
    for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", options, "tmpfs", "/dev/shm"]):
        if subprocess.run(["mount", *words], check=False).returncode:
            return NOT_PERMITTED
    images = EvaluationImages(index, torch.arange(32), evaluation_transform(size=224, crop=1.0))
    exact = exact_batches(images, batch=4, workers=8, timeout_seconds=30)
    crops = crops_of(index)
    keep_decoded(crops, True)
    random = training_batches(crops, 0, 2, workers=8, timeout_seconds=30, **one_rank(16))
    assert sum(len(ids) for _, _, ids in exact) == 32 and sum(len(batch.images) for batch in random) == 32
    assert crops.reader.kept.get(31) is not None
    return DONE


@pytest.mark.parametrize("options", ["size=64k", "ro"])
def test_sixteen_workers_need_nothing_in_dev_shm(tmp_path, options):
    """Docker gives 64 MB; torch's own transport takes a file for each tensor, and 128 KB of semaphores."""
    image = encode(Image.new("RGB", (40, 40), (9, 99, 199)), "PNG")
    index = open_index(str(write_tar(tmp_path / "a.tar", {f"{i:03d}.png": image for i in range(32)})))
    code = exit_code(fork(lambda: load(index, options)))
    if code == NOT_PERMITTED:
        pytest.skip("a mount namespace needs root")
    assert code == DONE


def taken_by_a_child(lock, seconds) -> bool:
    """Whether a forked process gets the lock within some seconds."""
    code = exit_code(fork(lambda: 2 if lock.acquire(True, seconds) else 0))
    assert code in (0, 2)
    return bool(code)


def test_the_lock_excludes_other_processes():
    lock = ForkLock()
    with lock:
        assert not lock.acquire(False) and not lock.acquire(True, 0.01)
        assert not taken_by_a_child(lock, 0.01)
    assert taken_by_a_child(lock, 60)
    assert not lock.acquire(False)  # the child took it
    lock.release()
    assert lock.acquire()
