"""Shards behind URLs: the same pixels as local ones, damage named, and addresses that are not plain refused."""

import importlib
import os
import socket
import sys
import urllib.request
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fsspec.registry import _registry

from maedistill.data.loading.loader import RandomCrops
from maedistill.data.loading.order import SampleOrder
from maedistill.data.loading.workers import load_batches
from maedistill.data.remote.download import read_small
from maedistill.data.remote.urls import TransferError, _read_response, _SafeRedirects
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.patterns import find_shards
from maedistill.data.shards.reader import ShardReader
from maedistill.errors import ConfigError, DataError
from tests.data.tar_files import suffixes, write_tar

pytestmark = pytest.mark.usefixtures("folder")
SPEC = {"size": 16, "scale": (0.2, 1.0), "ratio": (0.75, 4 / 3)}


def crops(index, *, window=1, count=100):
    order = SampleOrder(index.starts, seed=3, window=window)
    return RandomCrops(index, order, seed=3, **SPEC).__getitems__(list(range(count)))  # 96 are one epoch


@pytest.mark.parametrize("with_index", [True, False])
def test_remote_shards_give_the_same_pixels_as_local_ones(shards, server, folder, with_index):
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
    assert len(server.tars()) == 4 and suffixes(folder) == [".tar"] * 4
    assert len(open_index(pattern)) == 96 and len(server.tars()) == 4
    assert ShardReader(remote).read(50) == ShardReader(local).read(50)


def test_a_set_larger_than_the_cache_is_scanned_and_read_all_the_same(shards, server, folder, monkeypatch):
    server.files = {f"/{path.name}": path.read_bytes() for path in shards.glob("*.tar")}
    largest = max(map(len, server.files.values()))
    monkeypatch.setenv("MAEDISTILL_CACHE_GB", str(largest * 1.5 / 1e9))
    remote, local = open_index(f"{server.url}/train-{{000000..000003}}.tar"), open_index(str(shards / "train-*.tar"))
    assert torch.equal(crops(remote).images, crops(local).images)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= largest * 1.5


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


def test_a_scan_fetches_again_what_was_cached_more_than_a_day_ago(shards, server, folder):
    """Tars are padded and labels have one digit, so shards with mended labels keep their size."""
    name = "/train-000000.tar"
    server.files = {name: (shards / name[1:]).read_bytes()}
    before = open_index(server.url + name)
    data = server.files[name]
    for header in {data.index(key) for key in (f"{before.key(i)}.cls".encode() for i in range(len(before)))}:
        data = data[: header + 512] + b"7" + data[header + 513 :]
    server.files[name] = data
    for file in (folder.parent / "index").iterdir():
        file.unlink()
    assert open_index(server.url + name).labels.tolist() == before.labels.tolist()  # fetched within a day
    for file in (folder.parent / "index").iterdir():
        file.unlink()
    for file in folder.glob("*.tar"):
        os.utime(file, (0, 0))
    after = open_index(server.url + name)
    assert set(after.labels.tolist()) == {7} != set(before.labels.tolist())
    assert after.shard_bytes == before.shard_bytes and suffixes(folder) == [".tar"]
    assert ShardReader(after).read(0) == ShardReader(open_index(str(shards / name[1:]))).read(0)


def test_an_address_may_have_any_letters(shards, server):
    server.files = {f"/tr%C3%A4ning-%41+(1)/{path.name}": path.read_bytes() for path in shards.iterdir()}
    index = open_index(f"{server.url}/träning-%41+(1)/train-{{000000..000003}}.tar")
    assert len(index) == 96 and ShardReader(index).read(0)


@pytest.mark.parametrize("place", ["http://[half/a.tar", "https://[::z]/a.tar"])
def test_what_is_no_address_is_an_error_with_exit_3(shards, server, place):
    server.files, server.faults = {"/a.tar": b"x"}, [f"to {place}"] * 9
    for url in (f"{server.url}/a.tar", place):
        with pytest.raises(DataError):
            read_small(url)


@pytest.mark.parametrize("length", ["²", "9" * 5000, "-1", "1_0", "", None])
def test_a_length_that_is_no_number_is_not_stated(length):
    headers = {} if length is None else {"Content-Length": length}
    assert _read_response(SimpleNamespace(headers=headers, status=200), 0, 1).size is None
    headers = {"Content-Range": f"bytes 0-0/{length}"}
    with pytest.raises(TransferError):
        _read_response(SimpleNamespace(headers=headers, status=206), 0, 1)


@pytest.mark.parametrize(("code", "lines"), [(403, 1), (401, 1), (404, 0)])
def test_an_index_that_may_not_be_read_is_said(shards, server, capsys, code, lines):
    server.files = {f"/{path.name}": path.read_bytes() for path in shards.glob("*.tar")}
    server.missing = code
    assert len(open_index(f"{server.url}/train-{{000000..000003}}.tar")) == 96
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if str(code) in line and ".index.safetensors" in line]) == lines


def no_network(*_, **__):
    raise OSError("no network")


def test_small_files_are_whole_or_absent(server):
    server.files = {"/a": b"abc"}
    assert read_small(f"{server.url}/a") == b"abc"
    assert read_small(f"{server.url}/b") is None
    with pytest.raises(DataError, match="more than 2 bytes"):
        read_small(f"{server.url}/a", most=2)


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
    shard = write_tar(tmp_path / "a.tar", {"0.jpg": b"1"})  # it is there: what is refused is the index
    monkeypatch.setattr("socket.getaddrinfo", no_network)  # three of the patterns are plain addresses of one file
    with pytest.raises((ConfigError, DataError)):
        open_index(str(shard), index=pattern.format(canary=canary))
    assert not canary.exists()


def test_file_urls_are_paths(shards):
    assert find_shards(f"file://{shards}/train-*.tar") == find_shards(str(shards / "train-*.tar"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.delitem(_registry, "s3", raising=False)  # fsspec imports the package of a store once
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"s3:// needs a package.*s3fs") as caught:
        open_index("s3://bucket/train-*.tar")
    assert "maedistill[remote]" in caught.value.remedy


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
    monkeypatch.setattr("maedistill.data.remote.urls.PART", 10_000)  # several requests per shard
    local = open_index(str(shards / "train-*.tar"))
    remote = open_index("s3://bucket/in1k/train-*.tar")
    assert remote.fingerprint() == local.fingerprint() and not folder.exists()  # the index alone was fetched
    assert torch.equal(crops(remote).images, crops(local).images) and suffixes(folder) == [".tar"] * 4
    next(folder.iterdir()).unlink()
    dataset = RandomCrops(remote, SampleOrder(remote.starts, seed=3), seed=3, **SPEC)
    batches = load_batches(dataset, [[*range(96)]] * 2, workers=2)
    expected = crops(local, window=None, count=96).images
    assert all(torch.equal(batch.images, expected) for batch in batches)  # forked from a process that used the store
    bucket.delete_object(Bucket="bucket", Key="in1k/train.index.safetensors")
    again = open_index("s3://bucket/in1k/train-{000000..000003}.tar")
    assert again.fingerprint() == local.fingerprint() and again.classes == local.classes
    with pytest.raises(DataError, match=r"s3://bucket/in1k/none-0\.tar could not be read.*does not exist"):
        open_index("s3://bucket/in1k/none-0.tar")
    with pytest.raises(DataError, match="no file matches"):
        open_index("s3://bucket/in1k/none-*.tar")


def test_a_secure_address_is_not_followed_to_an_open_one():
    request = urllib.request.Request("https://h/a.tar")
    redirect = partial(_SafeRedirects().redirect_request, request, None, 302, "Found", {})
    with pytest.raises(TransferError):
        redirect("http://h/a.tar")
    assert redirect("https://h/b.tar").full_url == "https://h/b.tar"
