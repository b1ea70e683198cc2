"""Shared by the tests of the evaluation: ranks that are threads, and shards with an image that cannot be decoded."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards
from maedistill.processes import distributed


class Ranks:
    """Threads in place of processes; test_evaluate_tool.py has real ones."""

    def __init__(self, monkeypatch, world_size):
        self.world_size, self.mine, self.boxes = world_size, threading.local(), [[] for _ in range(world_size)]
        self.all_here = threading.Barrier(world_size, timeout=60)
        monkeypatch.setattr(distributed, "world_size", lambda: world_size)
        monkeypatch.setattr(distributed, "rank", lambda: self.mine.rank)
        monkeypatch.setattr(distributed, "all_gather_rows", self.gather)

    def gather(self, part):
        box = self.boxes[self.mine.rank]
        box.append(part)
        self.all_here.wait()
        return torch.cat([other[len(box) - 1] for other in self.boxes])

    def run(self, work):
        def rank(number):
            self.mine.rank = number
            return work()

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(rank, range(self.world_size)))


@pytest.fixture
def ranks(monkeypatch):
    """`ranks(n).run(work)`: what `work()` returns on each of n ranks."""
    return partial(Ranks, monkeypatch)


@pytest.fixture
def two_lines(run_command):
    """Runs `maedistill evaluate` with a mistake in this process: its lines of cause and remedy, and what it printed."""

    def start(code, *words):
        ended = run_command("evaluate", *words, "--workers", 0, "--threads", 1)
        assert ended.code == code, ended.err
        cause, remedy = ended.err.splitlines()
        assert cause.startswith("error: ") and remedy.startswith("  fix: ")
        return cause, remedy, ended.out

    return start


@pytest.fixture
def bad_index(tmp_path) -> ShardIndex:
    """Three images of two classes; the second cannot be decoded."""
    for i, label in enumerate("aab"):
        (tmp_path / "in" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), 80 * i, np.uint8)).save(tmp_path / "in" / label / f"{i}.png")
    make_shards(open_folder(tmp_path / "in"), tmp_path / "out")
    (tar,) = (tmp_path / "out").glob("*.tar")
    index = open_index(str(tar))
    data = bytearray(tar.read_bytes())
    data[index.offsets[1] + 8 : index.offsets[1] + index.sizes[1]] = bytes(index.sizes[1] - 8)
    tar.write_bytes(data)
    return index
