"""Remote shards against real servers on loopback, which refuse, stall, cut, corrupt and forget: all is well or said."""

import hashlib
import http.server
import importlib.util
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader

from maedistill.data.cache import RemoteShard, ShardCache
from maedistill.data.index import open_index
from maedistill.data.loader import RandomCrops
from maedistill.data.order import SampleOrder
from maedistill.data.patterns import find_shards
from maedistill.data.reader import ShardReader
from maedistill.data.remote import Patience, TransferError, read_small, retry
from maedistill.errors import ConfigError, DataError

HASTY = Patience(tries=3, timeout=0.5, wait=0.01, longest=20)
DATA = random.Random(0).randbytes(3 << 20)
SHA = hashlib.sha256(DATA).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; each request for a tar takes one fault off the list. Notes what it was asked for."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked = files, [], []
        self.ranges, self.tag, self.pause, self.over = True, '"one"', 0.0, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that went away."""

    def tars(self):
        """Byte ranges asked for of tars, but for the questions for the size."""
        return [(name, part) for name, part in self.asked if name.endswith(".tar") and part != "bytes=0-0"]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, part = self.server, self.headers.get("Range")
        server.asked.append((self.path, part))
        fault = server.faults.pop(0) if server.faults and self.path.endswith(".tar") and part != "bytes=0-0" else ""
        if fault.isdigit() or self.path not in server.files:
            return self.send_error(int(fault or 404))
        if fault.startswith("to "):
            self.send_response(302)
            self.send_header("Location", fault[3:])
            return self.end_headers()
        whole = body = server.files[self.path]
        start = 0
        if server.ranges and part and self.headers.get("If-Range", server.tag) == server.tag:
            start, _, last = part.removeprefix("bytes=").partition("-")
            start = int(start)
            body = whole[start : int(last) + 1 if last else None]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(whole)}")
        else:
            self.send_response(200)
        if fault != "cut, no length":
            self.send_header("Content-Length", str(len(body) // 2 if fault == "lie" else len(body)))
        if server.tag:
            self.send_header("ETag", server.tag)
        self.end_headers()
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        elif fault:
            body = body[: len(body) // 2]
        for at in range(0, len(body), 1 << 18):
            server.over.wait(server.pause)
            self.wfile.write(body[at : at + (1 << 18)])
        if fault == "stall":
            server.over.wait(10)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server({"/train/000.tar": DATA, "/val/000.tar": DATA[::-1]})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """All caches lie in the test's own folder; a few tries with short waits are the default."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Patience.__init__, "__defaults__", (HASTY.tries, HASTY.timeout, HASTY.wait, HASTY.longest))
    return tmp_path / "cache" / "maedistill" / "shards"


def shard(server, name="train/000.tar", *, sha256=SHA):
    return RemoteShard(f"{server.url}/{name}", len(DATA), sha256)


def read(descriptor):
    with open(descriptor, "rb") as file:
        return file.read()


def names(folder):
    return sorted(path.suffix for path in folder.iterdir())


@pytest.mark.parametrize("sha256", [SHA, None], ids=["known", "unknown"])
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("faults", [[], ["503", "503"], ["429"], ["stall"], ["cut"], ["cut", "cut, no length"]])
def test_what_one_more_try_can_mend_is_mended(server, folder, faults, ranges, sha256):
    server.faults, server.ranges = list(faults), ranges
    assert read(ShardCache(patience=HASTY).open(shard(server, sha256=sha256))) == DATA
    assert not server.faults and names(folder) == [".tar"]
    parts = [part for _, part in server.tars()]
    half = len(DATA) // 2
    if "cut" in faults or "stall" in faults:  # the half that came is not asked for again
        assert parts[:2] == [None, f"bytes={half}-"]
    else:
        assert parts == [None] * (1 + len(faults))


@pytest.mark.parametrize("tag", [None, 'W/"weak"'])
def test_without_checksum_and_tag_a_broken_download_begins_again(server, tag):
    server.faults, server.tag = ["cut"], tag
    assert read(ShardCache(patience=HASTY).open(shard(server, sha256=None))) == DATA
    assert [part for _, part in server.tars()] == [None, None]


def test_a_flipped_byte_is_found_and_fetched_again(server, folder):
    server.faults = ["flip"]
    assert read(ShardCache(patience=HASTY).open(shard(server))) == DATA
    assert [part for _, part in server.tars()] == [None, None] and names(folder) == [".tar"]


def test_a_file_that_changes_between_two_tries_is_not_patched_together(server, monkeypatch):
    server.faults, other = ["cut"], DATA[::-1]

    def change(_):
        server.files["/train/000.tar"], server.tag = other, '"two"'

    monkeypatch.setattr(time, "sleep", change)  # between the two tries
    assert read(ShardCache(patience=HASTY).open(shard(server, sha256=None))) == other
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
        (["to ftp://127.0.0.1/x"], 1, "redirects to an address that is not followed"),
    ],
)
def test_what_cannot_be_mended_names_the_url_and_the_last_try(server, folder, faults, tries, said):
    server.faults, server.ranges = list(faults), False
    began = time.monotonic()
    with pytest.raises(DataError, match=f"^{server.url}/train/000.tar could not be read.*{said}"):
        ShardCache(patience=HASTY).open(shard(server))
    assert len(server.tars()) == tries and time.monotonic() - began < 5
    assert ".tar" not in names(folder)


def test_a_server_that_drips_is_a_stalled_one(server):
    class Dripping:
        def read1(self, _):
            time.sleep(0.02)
            return b"x"

    from maedistill.data.remote import _read_chunks

    with pytest.raises(TransferError, match="stalls"):
        for _ in _read_chunks(Dripping(), 0.1):
            pass


def test_nobody_listening_is_tried_again_with_longer_waits(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def refuse():
        raise TransferError("refused")

    with pytest.raises(DataError, match=r"https://h/a could not be read \(5 tries.*refused"):
        retry(refuse, "https://h/a", patience=Patience(tries=5, wait=1, longest=1e9))
    assert all(2**i / 2 <= wait <= 2**i for i, wait in enumerate(waits)) and len(waits) == 4
    with pytest.raises(DataError, match="3 tries"):
        retry(refuse, "https://h/a", patience=Patience(tries=50, wait=1, longest=2))


def test_equal_names_do_not_collide_and_nothing_is_fetched_twice(server, folder):
    cache = ShardCache(patience=HASTY)
    other = hashlib.sha256(DATA[::-1]).hexdigest()
    for _ in range(2):
        assert read(cache.open(shard(server))) == DATA
        assert read(cache.open(shard(server, "val/000.tar", sha256=other))) == DATA[::-1]
    assert len(server.tars()) == 2 and names(folder) == [".tar", ".tar"]


def test_a_copy_that_was_cut_by_somebody_is_fetched_again(server, folder):
    cache = ShardCache(patience=HASTY)
    os.close(cache.open(shard(server)))
    os.truncate(next(folder.iterdir()), 99)
    assert read(cache.open(shard(server))) == DATA and len(server.tars()) == 2


DOWNLOAD = "import os, pickle, sys; cache, shard = pickle.load(sys.stdin.buffer); os.close(cache.open(shard))"


def start_download(*arguments):
    """A process of its own that opens a shard by a cache."""
    child = subprocess.Popen([sys.executable, "-c", DOWNLOAD], stdin=subprocess.PIPE)
    child.stdin.write(pickle.dumps(arguments))
    child.stdin.close()
    return child


def test_processes_that_want_the_same_shard_fetch_it_once(server, folder):
    server.pause, cache = 0.1, ShardCache(patience=HASTY)
    children = [start_download(cache, shard(server)) for _ in range(3)]
    assert [child.wait(timeout=60) for child in children] == [0, 0, 0]
    assert len(server.tars()) == 1 and names(folder) == [".tar"]


def test_a_killed_download_is_continued_and_leaves_nothing_else(server, folder):
    server.pause, cache = 0.1, ShardCache(patience=HASTY)
    child = start_download(cache, shard(server))
    deadline = time.monotonic() + 60
    while not (parts := list(folder.glob("*.part"))) or parts[0].stat().st_size < 1 << 20:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    arrived, server.pause = parts[0].stat().st_size, 0
    assert names(folder) == [".part"] and 0 < arrived < len(DATA)
    assert read(cache.open(shard(server))) == DATA and names(folder) == [".tar"]
    assert [part for _, part in server.tars()] == [None, f"bytes={arrived}-"]


SPEC = {"size": 16, "scale": (0.2, 1.0), "ratio": (0.75, 4 / 3)}


def crops(index, *, window=1, count=100):
    order = SampleOrder(index.starts, seed=3, window=window)
    return RandomCrops(index, order, seed=3, **SPEC).__getitems__(list(range(count)))  # 96 are one epoch


@pytest.mark.parametrize("with_index", [True, False])
def test_remote_shards_give_the_same_pixels_as_local_ones(shards, server, folder, with_index, monkeypatch):
    files = [path for path in shards.iterdir() if with_index or not path.name.endswith(".safetensors")]
    server.files, server.ranges = {f"/in1k/{path.name}": path.read_bytes() for path in files}, with_index
    local = open_index(str(shards / "train-*.tar"))
    pattern = f"{server.url}/in1k/train-{{000000..000003}}.tar"
    remote = open_index(pattern)
    assert remote.fingerprint() == local.fingerprint() and remote.shard_sha256 == local.shard_sha256
    assert remote.classes == local.classes and remote.shards[3] == f"{server.url}/in1k/train-000003.tar"
    assert len(server.tars()) == (0 if with_index else 4)  # a scan keeps what it fetches
    mine, theirs = crops(remote), crops(local)
    assert torch.equal(mine.images, theirs.images) and torch.equal(mine.labels, theirs.labels)
    assert len(server.tars()) == 4 and names(folder) == [".tar"] * 4
    assert len(open_index(pattern)) == 96 and len(server.tars()) == 4
    reader = pickle.loads(pickle.dumps(ShardReader(remote)))
    assert reader.read(50) == ShardReader(local).read(50)


def test_a_set_larger_than_the_cache_is_scanned_and_read_all_the_same(shards, server, folder, monkeypatch):
    server.files = {f"/{path.name}": path.read_bytes() for path in shards.glob("*.tar")}
    largest = max(map(len, server.files.values()))
    monkeypatch.setenv("MAEDISTILL_CACHE_GB", str(largest * 1.5 / 1e9))
    remote, local = open_index(f"{server.url}/train-{{000000..000003}}.tar"), open_index(str(shards / "train-*.tar"))
    assert torch.equal(crops(remote).images, crops(local).images)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= largest * 1.5


def test_read_ahead_brings_shards_before_they_are_read(shards, server, folder):
    server.files = {f"/{path.name}": path.read_bytes() for path in shards.iterdir()}
    reader = ShardReader(open_index(f"{server.url}/train-{{000000..000003}}.tar"))
    reader.read_ahead([2, 1])
    deadline = time.monotonic() + 10
    while len(list(folder.glob("*.tar")) if folder.exists() else ()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [name for name, _ in server.tars()] == ["/train-000002.tar", "/train-000001.tar"]
    reader.read(int(reader.index.starts[2]))
    assert len(server.tars()) == 2


def test_workers_that_read_ahead_share_the_work(shards, server, folder):
    server.files, server.pause = {f"/{path.name}": path.read_bytes() for path in shards.iterdir()}, 0.4
    index = open_index(f"{server.url}/train-{{000000..000003}}.tar")
    readers = [ShardReader(index) for _ in range(2)]
    for reader in readers:
        reader.read_ahead([2, 1])
    deadline = time.monotonic() + 10
    while len(server.tars()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert names(folder) == [".part", ".part"]  # both arrive at the same time
    assert readers[0].read(int(index.starts[2])) == readers[1].read(int(index.starts[2]))
    assert len(server.tars()) == 2


@pytest.mark.parametrize("fault", ["damaged", "changed"])
def test_damage_at_the_source_names_the_url_and_is_not_kept(shards, server, folder, fault):
    server.files = {f"/{path.name}": path.read_bytes() for path in shards.iterdir()}
    name = "/train-000001.tar"
    if fault == "damaged":
        server.files = {name: server.files[name][:-10240]}
        with pytest.raises(DataError, match=f"^{server.url}{name} is cut"):
            open_index(server.url + name)
    else:
        server.files[name] = server.files[name][:5000] + b"?" + server.files[name][5001:]
        with pytest.raises(DataError, match=f"^{server.url}{name} could not be read.*checksum"):
            ShardReader(open_index(server.url + name)).read(0)
    assert not list(folder.glob("*.tar"))


def test_a_missing_remote_shard_is_named(shards, server):
    server.files = {f"/{path.name}": path.read_bytes() for path in shards.glob("train-*.tar")}
    with pytest.raises(DataError, match=f"^{server.url}/train-000004.tar could not be read.*404"):
        open_index(f"{server.url}/train-{{000003..000004}}.tar")


def test_small_files_are_whole_or_absent(server):
    server.files |= {"/a": b"abc"}
    assert read_small(f"{server.url}/a", patience=HASTY) == b"abc"
    assert read_small(f"{server.url}/b", patience=HASTY) is None
    with pytest.raises(DataError, match="more than 2 bytes"):
        read_small(f"{server.url}/a", patience=HASTY, most=2)


@pytest.mark.parametrize(
    "pattern",
    [
        "pipe:touch {canary}", "PIPE:touch {canary}", " pipe:touch {canary}", "\tpipe:touch {canary}",
        "{{pi,}}pe:touch {canary}", "{{pipe,http}}:touch {canary}", "pipe://touch {canary}", "pipe:///bin/touch",
        "http://127.0.0.1/a.tar::pipe:touch {canary}", "simplecache::s3://b/a.tar", "s3::http://h/a.tar",
        "{{s3,simplecache}}::http://h/a.tar", "http://h/a.tar::", "zip://a::http://h/b.tar", "ftp://h/a.tar",
        "HTTP://h/a.tar", "Http://h/a.tar", " http://h/a.tar", "http://h/a .tar", "http:/a.tar", "http:a.tar",
        "http://h", "http:///a.tar", "data:text/plain,x", "jar:http://h/a.tar", "file:a.tar", "FILE:///a.tar",
        "file://host/a.tar", "ssh://h/a.tar", "local://a.tar", "memory://a.tar", "reference://a.tar", "git://a.tar",
        "github://o:r@/a.tar", "http://user:word@h/a.tar", "http://h/a.tar?token=1", "http://h/a.tar#b",
        "http://h/train-*.tar", "https://h/train-[01].tar", "s3://", "s3:///a.tar", "{{http://h,/tmp}}/a.tar",
        "http://h/{{0..99999999}}.tar", "s3://b/a.tar\nX-Header: 1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_plain_are_refused_and_nothing_runs(pattern, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connected"))
    canary = tmp_path / "canary"
    with pytest.raises(ConfigError):
        find_shards(pattern.format(canary=canary))
    with pytest.raises((ConfigError, DataError)):
        open_index(str(tmp_path / "a.tar"), index=pattern.format(canary=canary))
    assert not canary.exists()


def test_file_urls_are_paths(shards):
    assert find_shards(f"file://{shards}/train-*.tar") == find_shards(str(shards / "train-*.tar"))


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_missing_package_is_named():
    with pytest.raises(ConfigError, match=r"s3:// needs a package.*s3fs"):
        open_index("s3://bucket/train-*.tar")


@pytest.fixture
def bucket(monkeypatch, shards):
    """A bucket on a moto server with the tiny shards."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 'maedistill[remote]'")
    moto = pytest.importorskip("moto.server", reason="needs moto: pip install 'maedistill[test]'")
    import boto3
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for path in shards.iterdir():
        client.put_object(Bucket="bucket", Key=f"in1k/{path.name}", Body=path.read_bytes())
    yield client
    client.close()
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of botocore and moto
def test_a_store_that_never_answers_is_an_error(bucket, monkeypatch):
    s3fs = importlib.import_module("s3fs")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(DataError, match=r"s3://bucket/a\S+ could not be read \(3 tries.*no answer within 0\.5 s"):
            open_index("s3://bucket/a.tar")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of botocore, moto and fork
def test_shards_in_a_bucket(bucket, shards, folder, monkeypatch):
    monkeypatch.setattr("maedistill.data.remote.PART", 10_000)  # several requests per shard
    local = open_index(str(shards / "train-*.tar"))
    remote = open_index("s3://bucket/in1k/train-*.tar")
    assert remote.fingerprint() == local.fingerprint() and not folder.exists()  # the index alone was fetched
    assert torch.equal(crops(remote).images, crops(local).images) and names(folder) == [".tar"] * 4
    next(folder.iterdir()).unlink()
    dataset = RandomCrops(remote, SampleOrder(remote.starts, seed=3), seed=3, **SPEC)
    batches = DataLoader(dataset, num_workers=2, batch_sampler=[[*range(96)]] * 2, collate_fn=lambda batch: batch)
    expected = crops(local, window=None, count=96).images
    assert all(torch.equal(batch.images, expected) for batch in batches)  # forked from a process that used the store
    bucket.delete_object(Bucket="bucket", Key="in1k/train.index.safetensors")
    again = open_index("s3://bucket/in1k/train-{000000..000003}.tar")
    assert again.fingerprint() == local.fingerprint() and again.classes == local.classes
    with pytest.raises(DataError, match=r"s3://bucket/in1k/none-0\.tar could not be read.*does not exist"):
        open_index("s3://bucket/in1k/none-0.tar")
    with pytest.raises(DataError, match="no file matches"):
        open_index("s3://bucket/in1k/none-*.tar")
