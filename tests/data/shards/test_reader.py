"""Reading samples: through many shards, and forked; shards that changed are noticed."""

import os
import shutil
import tarfile

import pytest

from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.reader import MOST_OPEN, ShardReader
from maedistill.errors import DataError
from tests.data.tar_files import write_split, write_tar
from tests.support.forked import exit_code, fork


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # torch's threads, in a full test run
def test_reader_survives_a_fork_and_more_shards_than_it_holds_open(tmp_path):
    index = open_index(write_split(tmp_path, shards=MOST_OPEN + 6, samples=1))
    reader = ShardReader(index)
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for i in range(len(index)):
            assert reader.read(i) == f"image {i} 0".encode()
    assert len(os.listdir("/proc/self/fd")) - open_before <= MOST_OPEN
    assert exit_code(fork(lambda: reader.read(4) != b"image 4 0")) == 0
    assert reader.read(5) == b"image 5 0"


@pytest.mark.parametrize("name", ["sample", "folder/sample", "a-name-of-many-letters" * 5, "échantillon"])
def test_reader_notices_a_shard_that_became_another_of_its_size(tmp_path, name):
    """Labels come from the index: the samples of another shard would be learned with them."""
    for shard in range(2):
        members = {f"{name}-{shard}{i}.jpg": b"x" * 100 for i in range(3)}
        write_tar(tmp_path / f"train-{shard}.tar", members, tarfile.PAX_FORMAT)
    index = open_index(str(tmp_path / "train-*.tar"))
    assert [ShardReader(index).read(i) for i in range(6)] == 6 * [b"x" * 100]
    shutil.copy(index.shards[0], index.shards[1])
    if len(name) > 90 or not name.isascii():  # such names stand elsewhere, and are taken on trust
        assert ShardReader(index).read(4) == b"x" * 100
        return
    with pytest.raises(DataError, match=r"train-1\.tar holds other samples than its index says"):
        ShardReader(index).read(4)


def test_reader_notices_a_shard_that_changes_or_goes(tmp_path):
    index = open_index(write_split(tmp_path))
    os.truncate(index.shards[1], 600)
    os.remove(index.shards[2])
    reader = ShardReader(index)
    for i, match in ((5, "changed its size"), (9, "is missing")) * 2:  # the second time, too
        with pytest.raises(DataError, match=match):
            reader.read(i)
