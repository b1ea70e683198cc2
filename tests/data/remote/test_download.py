"""One shard from a server that refuses, stalls, cuts, corrupts and changes: it is whole in the end, or all is said."""

import hashlib
import os
import random
import signal
import time

import pytest

from maedistill.data.remote.cache import ShardCache
from maedistill.data.remote.download import RemoteShard, RetryPolicy, retry
from maedistill.data.remote.urls import TransferError, _read_chunks
from maedistill.errors import DataError
from tests.data.tar_files import suffixes
from tests.support.forked import exit_code, fork
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.usefixtures("folder"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),  # the server's threads
]
DATA = random.Random(0).randbytes(3 << 20)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def files(server):
    server.files = {"/train/000.tar": DATA, "/val/000.tar": DATA[::-1]}


def shard(server, name="train/000.tar", *, sha256=SHA):
    return RemoteShard(f"{server.url}/{name}", len(DATA), sha256)


def read(descriptor):
    with open(descriptor, "rb") as file:
        return file.read()


@pytest.mark.parametrize("sha256", [SHA, None], ids=["known", "unknown"])
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("faults", [[], ["503", "503"], ["429"], ["stall"], ["cut"], ["cut", "cut, no length"]])
def test_what_one_more_try_can_mend_is_mended(server, folder, faults, ranges, sha256):
    server.faults, server.ranges = list(faults), ranges
    assert read(ShardCache().open(shard(server, sha256=sha256))) == DATA
    assert not server.faults and suffixes(folder) == [".tar"]
    parts = [part for _, part in server.tars()]
    half = len(DATA) // 2
    if "cut" in faults or "stall" in faults:  # the half that came is not asked for again
        assert parts[:2] == [None, f"bytes={half}-"]
    else:
        assert parts == [None] * (1 + len(faults))


@pytest.mark.parametrize("tag", [None, 'W/"weak"'])
def test_without_checksum_and_tag_a_broken_download_begins_again(server, tag):
    server.faults, server.tag = ["cut"], tag
    assert read(ShardCache().open(shard(server, sha256=None))) == DATA
    assert [part for _, part in server.tars()] == [None, None]


def test_a_flipped_byte_is_found_and_fetched_again(server, folder):
    server.faults = ["flip"]
    assert read(ShardCache().open(shard(server))) == DATA
    assert [part for _, part in server.tars()] == [None, None] and suffixes(folder) == [".tar"]


def test_a_file_that_changes_between_two_tries_is_not_patched_together(server, monkeypatch):
    server.faults, other = ["cut"], DATA[::-1]

    def change(_):
        server.files["/train/000.tar"], server.tag = other, '"two"'

    monkeypatch.setattr(time, "sleep", change)  # between the two tries
    assert read(ShardCache().open(shard(server, sha256=None))) == other
    assert len(server.tars()) == 2


@pytest.mark.parametrize(
    ("faults", "tries", "said"),
    [
        (["503"] * 9, 3, "3 tries in .* 503 Service Unavailable"),
        (["stall"] * 9, 3, "3 tries in .* timed out"),
        (["404"], 1, "1 try in .* 404 Not Found"),
        (["403"], 1, "1 try in .* 403 Forbidden"),
        (["flip"] * 9, 2, "2 tries in .* checksum is not the one in the index, twice in the same way"),
        (["lie"], 1, "1 try in .* has 1,572,864 bytes instead of 3,145,728"),
        (["cut, no length"] * 9, 3, "3 tries in .* ended after 1,572,864 of 3,145,728 bytes"),
        (["to file:///etc/passwd"], 1, "302 Found - Redirection to url 'file:///etc/passwd' is not allowed"),
        (["to data:text/plain,x"], 1, "302 Found - Redirection to url 'data:text/plain,x' is not allowed"),
        (["to ftp://127.0.0.1/x"], 1, "redirects to an address that is not followed"),
    ],
)
def test_what_cannot_be_mended_names_the_url_and_the_last_try(server, folder, faults, tries, said):
    server.faults, server.ranges = list(faults), False
    began = time.monotonic()
    with pytest.raises(DataError, match=f"^{server.url}/train/000.tar could not be read.*{said}"):
        ShardCache().open(shard(server))
    assert len(server.tars()) == tries and time.monotonic() - began < 5
    assert ".tar" not in suffixes(folder)


def test_a_server_that_drips_is_a_stalled_one():
    class Dripping:
        def read1(self, _):
            time.sleep(0.02)
            return b"x"

    with pytest.raises(TransferError, match="stalls"):
        for _ in _read_chunks(Dripping(), 0.1):
            pass


def test_nobody_listening_is_tried_again_with_longer_waits(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def refuse(timeout):
        raise TransferError("refused")

    with pytest.raises(DataError, match=r"https://h/a could not be read \(5 tries.*refused"):
        retry(refuse, "https://h/a", policy=RetryPolicy(tries=5, wait=1, max_seconds=1e9))
    assert all(2**i / 2 <= wait <= 2**i for i, wait in enumerate(waits)) and len(waits) == 4
    with pytest.raises(DataError, match="3 tries"):
        retry(refuse, "https://h/a", policy=RetryPolicy(tries=50, wait=1, max_seconds=2))


def test_equal_names_do_not_collide_and_nothing_is_fetched_twice(server, folder):
    cache = ShardCache()
    other = hashlib.sha256(DATA[::-1]).hexdigest()
    for _ in range(2):
        assert read(cache.open(shard(server))) == DATA
        assert read(cache.open(shard(server, "val/000.tar", sha256=other))) == DATA[::-1]
    assert len(server.tars()) == 2 and suffixes(folder) == [".tar", ".tar"]


def test_a_copy_that_was_cut_by_somebody_is_fetched_again(server, folder):
    cache = ShardCache()
    os.close(cache.open(shard(server)))
    os.truncate(next(folder.iterdir()), 99)
    assert read(cache.open(shard(server))) == DATA and len(server.tars()) == 2


def test_processes_that_want_the_same_shard_fetch_it_once(server, folder):
    server.pause, cache = 0.1, ShardCache(policy=RetryPolicy(timeout=30.0))
    children = [fork(lambda: os.close(cache.open(shard(server)))) for _ in range(3)]
    assert [exit_code(child) for child in children] == [0, 0, 0]
    assert len(server.tars()) == 1 and suffixes(folder) == [".tar"]


def test_a_killed_download_is_continued_and_leaves_nothing_else(server, folder):
    server.pause, cache = 0.1, ShardCache(policy=RetryPolicy(timeout=30.0))
    child = fork(lambda: os.close(cache.open(shard(server))))
    wait_until(lambda: any(part.stat().st_size >= 1 << 20 for part in folder.glob("*.part")))
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL
    [part] = folder.iterdir()
    arrived, server.pause = part.stat().st_size, 0
    assert suffixes(folder) == [".part"] and 0 < arrived < len(DATA)
    assert read(cache.open(shard(server))) == DATA and suffixes(folder) == [".tar"]
    assert [part for _, part in server.tars()] == [None, f"bytes={arrived}-"]
