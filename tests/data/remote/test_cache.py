"""The cache of remote shards: its bound, who is evicted, who never is, and who says where it is and how large."""

import os
from contextlib import contextmanager

import pytest

from maedistill.data.remote.cache import ShardCache, default_bound, default_folder, set_cache
from maedistill.data.remote.download import RemoteShard, RetryPolicy
from maedistill.data.remote.urls import UrlStream
from maedistill.errors import ConfigError, DataError

SIZE = 1000


@pytest.fixture
def fetched(monkeypatch):
    """URLs in the order in which they were downloaded; each holds SIZE bytes."""
    urls = []

    @contextmanager
    def open_stream(url, *, start=0, tag=None, timeout):
        urls.append(url)
        yield UrlStream(start, SIZE, None, iter([url.encode().ljust(SIZE)[start:]]))

    monkeypatch.setattr("maedistill.data.remote.download.open_stream", open_stream)
    return urls


def cache_of(folder, shards):
    return ShardCache(folder=folder, max_bytes=shards * SIZE, policy=RetryPolicy(tries=1, max_seconds=0.5))


def touch(cache, name, at):
    """Uses a shard, and sets the time of that use."""
    descriptor = cache.open(RemoteShard(name, SIZE))
    assert os.read(descriptor, SIZE) == name.encode().ljust(SIZE)
    os.utime(descriptor, (at, at))
    os.close(descriptor)


def test_what_was_not_used_for_longest_makes_room(tmp_path, fetched):
    cache = cache_of(tmp_path / "new" / "cache", 3)
    for at, name in enumerate("abcadae"):  # d evicts b, e evicts c
        touch(cache, name, 1000 + at)
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 3 * SIZE
    assert fetched == [*"abcde"]
    for at, name in enumerate("ade"):
        touch(cache, name, 2000 + at)
    assert fetched == [*"abcde"]


def test_a_use_is_noted(tmp_path, fetched):
    cache = cache_of(tmp_path, 2)
    touch(cache, "a", 1000)
    touch(cache, "b", 1001)
    os.close(cache.open(RemoteShard("a", SIZE)))  # a is now the later one
    touch(cache, "c", 1002)
    touch(cache, "a", 1003)
    assert fetched == ["a", "b", "c"]


def test_a_shard_in_use_is_never_evicted(tmp_path, fetched):
    cache = cache_of(tmp_path, 2)
    touch(cache, "a", 1000)
    held = [cache.open(RemoteShard(name, SIZE)) for name in "ab"]  # one that was there, one that comes
    for _ in range(2):
        with pytest.raises(DataError, match=r"c has 1,000 bytes, for which the cache .* has no room"):
            cache.open(RemoteShard("c", SIZE))
    assert len(list(tmp_path.iterdir())) == 2
    os.close(held[1])
    touch(cache, "c", 1000)
    touch(cache, "a", 1000)
    assert fetched == ["a", "b", "c"]
    os.close(held[0])


def test_a_shard_larger_than_the_cache_empties_nothing(tmp_path, fetched):
    cache = cache_of(tmp_path, 1)
    touch(cache, "a", 1000)
    with pytest.raises(DataError, match="no room"):
        cache.open(RemoteShard("b", SIZE + 1))
    touch(cache, "a", 1000)
    assert fetched == ["a"]


def test_an_unfinished_download_counts_as_what_it_will_be_and_goes_first(tmp_path, fetched):
    cache = cache_of(tmp_path, 3)
    part = tmp_path / f"{'0' * 64}-{2 * SIZE}.part"
    part.write_bytes(b"x")
    os.utime(part, (1, 1))
    touch(cache, "a", 1000)
    assert part.exists()
    touch(cache, "b", 1001)
    assert not part.exists() and len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_is_full_is_named(tmp_path, fetched, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(DataError, match=r"cannot be used: .*No space left"):
        patched.setattr("maedistill.data.remote.download.os.pwrite", full)
        cache_of(tmp_path, 3).open(RemoteShard("a", SIZE))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be used: .*\n.*MAEDISTILL_CACHE=DIR"):
        cache_of(tmp_path / "file", 3).open(RemoteShard("a", SIZE))
    assert len(fetched) == 1  # a full disk is no reason for another try


def test_the_environment_names_folder_and_bound(tmp_path, monkeypatch):
    monkeypatch.delenv("MAEDISTILL_CACHE", raising=False)
    monkeypatch.delenv("MAEDISTILL_CACHE_GB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "maedistill" / "shards" and default_bound() == 100_000_000_000
    monkeypatch.setenv("MAEDISTILL_CACHE", "~/shards")
    monkeypatch.setenv("MAEDISTILL_CACHE_GB", "0.5")
    assert str(default_folder()) == os.path.expanduser("~/shards") and default_bound() == 500_000_000
    for text in ("", "0", "-1", "many", "nan", "inf"):
        monkeypatch.setenv("MAEDISTILL_CACHE_GB", text)
        with pytest.raises(ConfigError, match="MAEDISTILL_CACHE_GB"):
            default_bound()


def test_what_a_config_says_wins_over_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MAEDISTILL_CACHE", str(tmp_path / "environment"))
    monkeypatch.setenv("MAEDISTILL_CACHE_GB", "no number")
    set_cache(folder=None, gigabytes=0.1)
    assert ShardCache().folder == tmp_path / "environment" and ShardCache().max_bytes == 100_000_000
    set_cache(folder=str(tmp_path / "config"), gigabytes=None)
    assert ShardCache().folder == tmp_path / "config" and ShardCache().max_bytes == 100_000_000


def test_files_that_are_not_the_caches_are_neither_counted_nor_removed(tmp_path, fetched):
    """Somebody may name the folder where shards of their own lie."""
    others = [tmp_path / name for name in ("train-000000.tar", "a.part", f"{'0' * 64}-x.part", "notes")]
    for path in others:
        path.write_bytes(b"x" * 5 * SIZE)
    cache = cache_of(tmp_path, 2)
    for at, name in enumerate("abc"):
        touch(cache, name, 1000 + at)
    assert all(path.stat().st_size == 5 * SIZE for path in others) and len(list(tmp_path.iterdir())) == 6
