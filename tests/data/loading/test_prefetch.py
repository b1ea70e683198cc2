"""The copies to a GPU one batch ahead: on a pretended device without one, and the real thing where there is one."""

import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from maedistill.data.loading import batch as batch_file
from maedistill.data.loading import evaluation as evaluation_file
from maedistill.data.loading.batch import Batch, prefetched
from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform, exact_batches
from maedistill.data.loading.workers import load_batches
from maedistill.data.shards.open_index import open_index
from maedistill.errors import DataError

CPU = torch.device("cpu")


class Stream:
    """Counts copies instead of making them: those put on this stream, and those of others that it waits for."""

    def __init__(self):
        self.copies = self.waits_for = 0

    def wait_stream(self, other):
        self.waits_for = other.copies


class Recorded(torch.Tensor):
    """A tensor that knows which streams use it."""

    def record_stream(self, stream):
        self.streams = [*getattr(self, "streams", []), stream]


class Device:
    """Stands for torch.cuda: the side stream that is made, the one that computes, and the one that is chosen now."""

    def __init__(self, monkeypatch):
        self.computing = self.chosen = Stream()
        self.side = None
        monkeypatch.setattr(torch.cuda, "Stream", self.make)
        monkeypatch.setattr(torch.cuda, "stream", self.choose)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.chosen)

    def make(self, device):
        self.side = Stream()
        return self.side

    @contextmanager
    def choose(self, stream):
        before, self.chosen = self.chosen, stream
        yield
        self.chosen = before


class Pinned(torch.Tensor):
    """A tensor on the host that notes its copies to the device."""

    def to(self, device, *, non_blocking=False):
        assert non_blocking, "the host would wait for the copy"
        self.gpu.chosen.copies += 1
        return (self + 0).as_subclass(Recorded)


def pinned(number, gpu):
    tensor = torch.tensor(number).as_subclass(Pinned)
    tensor.gpu = gpu
    return tensor


@pytest.fixture
def gpu(monkeypatch):
    return Device(monkeypatch)


def batches_of(gpu, count):
    """Batches of one number each, three times for the device and once for the host."""
    return (
        Batch(*(pinned(i, gpu) for _ in range(3)), torch.tensor(i).as_subclass(Recorded), (str(i),))
        for i in range(count)
    )


def test_each_batch_is_copied_one_ahead_and_waited_for_alone(gpu):
    seen = []
    for batch in prefetched(batches_of(gpu, 5), CPU):
        n = len(seen)
        seen.append((int(batch.images), *batch.bad))
        assert gpu.computing.waits_for == 3 * (n + 1), "its own copies must have ended, and the next ones must not"
        assert gpu.side.copies == 3 * min(n + 2, 5) and gpu.computing.copies == 0
        for part in batch[:3]:
            assert part.streams == [gpu.computing], "or its memory could be taken again too early"
    assert seen == [(i, str(i)) for i in range(5)]


def test_tuples_are_copied_ahead_as_well(gpu):
    batches = prefetched(((pinned(i, gpu), pinned(-i, gpu)) for i in range(3)), CPU)
    for n, (one, other) in enumerate(batches):
        assert (int(one), int(other)) == (n, -n)
        assert gpu.computing.waits_for == 2 * (n + 1) and gpu.side.copies == 2 * min(n + 2, 3)
        assert one.streams == other.streams == [gpu.computing] and gpu.computing.copies == 0


def exact_images(index, device):
    images = EvaluationImages(index, torch.arange(24), evaluation_transform(size=32, crop=1.0))
    return exact_batches(images, batch=7, workers=0, device=device)


def test_what_is_evaluated_on_a_gpu_comes_from_pinned_memory_and_ahead(gpu, monkeypatch, shards):
    index = open_index(str(shards / "val-*.tar"))
    expected, asked, moved = list(exact_images(index, CPU)), [], []

    def pretend(*arguments, pin_memory, **keywords):
        asked.append(pin_memory)
        return load_batches(*arguments, **keywords)

    def move(batch, device):
        moved.append((device.type, gpu.chosen is gpu.side))
        return batch

    monkeypatch.setattr(evaluation_file, "load_batches", pretend)
    monkeypatch.setattr(batch_file, "_moved", move)
    for n, (batch, same) in enumerate(zip(exact_images(index, torch.device("cuda")), expected, strict=True)):
        assert all(torch.equal(one, other) for one, other in zip(batch, same, strict=True))
        assert len(moved) == min(n + 2, 4)
    assert asked == [True] and set(moved) == {("cuda", True)}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_error_comes_after_the_batches_before_it_and_then_nothing(gpu, count):
    def failing():
        yield from batches_of(gpu, count)
        raise DataError("a shard is gone", "put it back")

    seen, batches = [], prefetched(failing(), CPU)
    with pytest.raises(DataError, match="a shard is gone"):
        seen.extend(batch.bad for batch in batches)  # it keeps what came before the error
    assert seen == [(str(i),) for i in range(count)] and list(batches) == []


def test_an_interrupt_is_not_kept_for_later(gpu):
    def interrupted():
        yield from batches_of(gpu, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(prefetched(interrupted(), CPU))


class Endless:
    """Images without end, for workers."""

    reader = SimpleNamespace(index=None, on_read=None, longest_fetch=0.0)

    def __getitems__(self, ids):
        return (torch.tensor(ids),)


@pytest.mark.parametrize("ended_by", ["close", "the last reference"])
def test_the_workers_end_with_it(gpu, ended_by):
    before = set(psutil.Process().children())
    loaded = load_batches(Endless(), ([i, i + 1] for i in itertools.count(step=2)), workers=1)
    batches = prefetched(map(lambda batch: (batch[0].as_subclass(Recorded),), loaded), CPU)
    del loaded
    assert next(batches)[0].tolist() == [0, 1]
    workers = set(psutil.Process().children()) - before
    assert len(workers) == 1
    if ended_by == "close":
        batches.close()
        assert list(batches) == []
    else:
        del batches
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; written on a machine without one")
def test_on_a_gpu_no_batch_is_overwritten_while_a_slow_step_reads_it():
    """Batches as large as the memory that the one before gives back, and a step that is slower than their copies."""
    device, size = torch.device("cuda", 0), (64, 3, 224, 224)
    hosts = [torch.full(size, i, dtype=torch.uint8).pin_memory() for i in range(20)]
    work = torch.rand(4096, 4096, device=device)
    sums = []
    for (images,) in prefetched(iter([(host,) for host in hosts]), device):
        for _ in range(10):
            work = (work @ work).clamp(0, 1)
        sums.append(images.sum(dtype=torch.int64) + 0 * work[0, 0].long())
    assert [int(total) for total in sums] == [i * int(np.prod(size)) for i in range(20)]
