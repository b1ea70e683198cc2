"""The cache of remote shards: its bound, what is evicted and what never is, and what other users may plant in it."""

import fcntl
import os
import shutil
import stat
import time
from contextlib import contextmanager

import pytest

from maedistill.data.remote import cache as module
from maedistill.data.remote.cache import ShardCache, default_bound, default_folder
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


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """Sets how many bytes the disk of the cache has room for; files of the cache take theirs."""

    def usage(_):
        used = sum(path.stat().st_size for path in tmp_path.iterdir())
        return shutil._ntuple_diskusage(usage.total, used, usage.total - used)

    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    return usage


def test_what_downloads_still_lack_is_not_free(tmp_path, fetched, disk):
    """Two processes see the same free bytes; one of them would run out of space midway."""
    cache, disk.total = cache_of(tmp_path, 10), int(3.5 * SIZE)
    touch(cache, "a", 1000)
    descriptor, mine = cache._reserve(RemoteShard("b", SIZE), tmp_path / f"{'b' * 64}-{SIZE}.part")
    assert mine
    touch(cache, "c", 1001)
    assert len([*tmp_path.glob("*.tar")]) == 2
    touch(cache, "d", 1002)  # evicts a: b has taken no byte yet
    assert len([*tmp_path.glob("*.tar")]) == 2 and len([*tmp_path.glob("*.part")]) == 1
    held = [cache.open(RemoteShard(name, SIZE)) for name in "cd"]
    with pytest.raises(DataError):
        cache.open(RemoteShard("e", SIZE))
    assert len([*tmp_path.glob("*.part")]) == 1 and fetched == [*"acd"]
    for number in (descriptor, *held):
        os.close(number)


def test_a_resumed_download_makes_room_and_keeps_2_percent_of_the_disk_free(tmp_path, fetched, disk):
    cache, disk.total = cache_of(tmp_path, 10), 100 * SIZE
    part = tmp_path / f"{module._url_hash('b')}-{SIZE}.part"
    touch(cache, "a", 1000)
    part.write_bytes(b"x" * (SIZE // 2))
    disk.total = int(2.01 * SIZE)  # room for both, but less than 2 % would be left
    touch(cache, "b", 1001)
    assert len([*tmp_path.iterdir()]) == 1
    disk.total = SIZE // 2
    next(tmp_path.iterdir()).unlink()
    part.write_bytes(b"x")
    patient = ShardCache(folder=tmp_path, max_bytes=10 * SIZE, policy=RetryPolicy(tries=1, max_seconds=60))
    began = time.monotonic()
    with pytest.raises(DataError):
        patient.open(RemoteShard("b", SIZE))
    assert time.monotonic() - began < 30, "there is nothing to wait for"
    assert part.exists() and fetched == ["a", "b"]


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


def test_files_that_are_not_the_caches_are_neither_counted_nor_removed(tmp_path, fetched):
    """Somebody may name the folder where shards of their own lie."""
    others = [tmp_path / name for name in ("train-000000.tar", "a.part", f"{'0' * 64}-x.part", "notes")]
    for path in others:
        path.write_bytes(b"x" * 5 * SIZE)
    cache = cache_of(tmp_path, 2)
    for at, name in enumerate("abc"):
        touch(cache, name, 1000 + at)
    assert all(path.stat().st_size == 5 * SIZE for path in others) and len(list(tmp_path.iterdir())) == 6


def test_the_folder_is_closed_to_others(tmp_path, fetched):
    (tmp_path / "cache").mkdir(mode=0o755)
    os.close(cache_of(tmp_path / "cache", 2).open(RemoteShard("a", SIZE)))
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path, fetched, mode):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(ConfigError, match="other users can write"):
        cache_of(tmp_path / "cache", 2).open(RemoteShard("a", SIZE))
    assert fetched == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path, fetched):
    (tmp_path / "cache").mkdir(mode=0o700)
    os.chown(tmp_path / "cache", 12345, 12345)
    with pytest.raises(ConfigError, match="another user"):
        cache_of(tmp_path / "cache", 2).open(RemoteShard("a", SIZE))


@pytest.mark.parametrize("plant", [os.symlink, os.link])
@pytest.mark.parametrize("suffix", [".part", ".tar"])
def test_a_planted_link_is_replaced_and_what_it_names_is_untouched(tmp_path, fetched, plant, suffix):
    thesis = tmp_path / "thesis.tex"
    thesis.write_bytes(b"x" * SIZE)
    cache = cache_of(tmp_path / "cache", 2)
    os.close(cache.open(RemoteShard("a", SIZE)))
    whole = next(cache.folder.iterdir())
    whole.unlink()
    part = f"{whole.name.split('-')[0]}-{SIZE}.part"
    plant(thesis, cache.folder / (part if suffix == ".part" else whole.name))
    touch(cache, "a", 1000)  # the shard's own bytes
    assert thesis.read_bytes() == b"x" * SIZE and not whole.is_symlink() and whole.stat().st_nlink == 1
    assert fetched == ["a", "a"]


def test_other_bytes_of_the_same_size_are_found_once_in_each_process(tmp_path, fetched, monkeypatch):
    """A flipped bit, or a file of the right name: the shard is downloaded again. An unchanged file is read once."""
    cache = cache_of(tmp_path, 2)
    os.close(cache.open(RemoteShard("a", SIZE)))
    whole = next(cache.folder.iterdir())
    monkeypatch.setattr(module, "_verified", {})  # another process
    data = bytearray(whole.read_bytes())
    data[500] ^= 1
    times = whole.stat()
    whole.write_bytes(data)
    os.utime(whole, ns=(times.st_atime_ns, times.st_mtime_ns))  # as the disk would: no time says it
    touch(cache, "a", 1000)
    assert fetched == ["a", "a"]

    os.close(cache.open(RemoteShard("a", SIZE)))  # `touch` has changed a time: the file is checked again
    monkeypatch.setattr(module.hashlib, "file_digest", None)
    for _ in range(3):
        os.close(cache.open(RemoteShard("a", SIZE)))  # unchanged: not read again
    assert fetched == ["a", "a"]


def test_a_lock_that_another_process_holds_has_an_end_and_a_holder(tmp_path, fetched):
    cache = cache_of(tmp_path, 2)
    os.close(cache.open(RemoteShard("a", SIZE)))
    holder = os.open(next(cache.folder.iterdir()), os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(DataError, match=rf"locked for \d+ s by process {os.getpid()} \("):
        cache.open(RemoteShard("a", SIZE))
    os.close(holder)
