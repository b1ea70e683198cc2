"""Remote shards before they are needed: fetched once, in the background, and no more of them than the cache holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maedistill.data.remote.cache import largest_window, require_room
from maedistill.data.remote.download import RetryPolicy
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.reader import ShardReader
from maedistill.errors import ConfigError
from tests.support.waiting import wait_until

URLS = ["https://here/a.tar"]  # room matters for remote shards only


def test_read_ahead_brings_shards_before_they_are_read(shards, server, folder):
    server.files = {f"/{path.name}": path.read_bytes() for path in shards.iterdir()}
    reader = ShardReader(open_index(f"{server.url}/train-{{000000..000003}}.tar"))
    reader.read_ahead([2, 1])
    wait_until(lambda: len(list(folder.glob("*.tar"))) == 2)
    assert [name for name, _ in server.tars()] == ["/train-000002.tar", "/train-000001.tar"]
    reader.read(int(reader.index.starts[2]))
    assert len(server.tars()) == 2


def test_workers_that_read_ahead_share_the_work(shards, server, folder, monkeypatch):
    monkeypatch.setattr(RetryPolicy.__init__, "__defaults__", (1, 60.0, 0.01, 60.0))  # the server waits for the test
    server.files = {f"/{path.name}": path.read_bytes() for path in shards.iterdir()}
    index = open_index(f"{server.url}/train-{{000000..000003}}.tar")
    server.pause = 60
    readers = [ShardReader(index) for _ in range(2)]
    for reader in readers:
        reader.read_ahead([2, 1])
    wait_until(lambda: len(server.tars()) == 2)
    assert [path.suffix for path in folder.iterdir()] == [".part", ".part"]  # each reader fetches one of the two
    server.over.set()
    assert readers[0].read(int(index.starts[2])) == readers[1].read(int(index.starts[2]))
    assert len(server.tars()) == 2


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30), bound=st.integers(1, 400))
def test_any_two_of_the_largest_windows_fit(sizes, bound):
    window = largest_window(sizes, bound)
    if window == len(sizes):
        assert sum(sizes) <= bound
    else:
        ordered = sorted(sizes, reverse=True)
        assert sum(ordered[: 2 * window]) <= bound < sum(ordered[: 2 * window + 2])
        if window:
            require_room(URLS, sizes, window=window, cache_bytes=bound)
        with pytest.raises(ConfigError):
            require_room(URLS, sizes, window=None, cache_bytes=bound)
        with pytest.raises(ConfigError):
            require_room(URLS, sizes, window=window + 1, cache_bytes=bound)
        require_room(["a.tar"], sizes, window=None, cache_bytes=bound)


def test_the_remedy_for_a_small_cache_is_exact():
    sizes = [140_000_000] * 1024
    with pytest.raises(ConfigError, match=r"is null, but a cache of 100 GB.* 1,024 remote shards \(143 GB\)") as caught:
        require_room(URLS, sizes, window=None, cache_bytes=100_000_000_000)
    assert caught.value.remedy == "set data.shuffle_window=357, or MAEDISTILL_CACHE_GB=143.36"
    require_room(URLS, sizes, window=357, cache_bytes=100_000_000_000)
    require_room(URLS, sizes, window=None, cache_bytes=143_360_000_000)
    with pytest.raises(ConfigError) as caught:
        require_room(URLS, sizes, window=None, cache_bytes=200_000_000)
    assert caught.value.remedy == "set data.shuffle_window=1 and MAEDISTILL_CACHE_GB=0.28 or more"
