"""Read shards in full and compare them with their index: `maedistill shards --verify`.

A shard without an index is read to its end: nothing says what it should hold, but a cut or damaged one shows.
"""

from collections import deque
from pathlib import Path

from maedistill.data.shards.index import SUFFIX, ShardIndex, load_index
from maedistill.data.shards.progress_bar import ProgressBar
from maedistill.data.shards.scan import scan_shard
from maedistill.data.shards.tars import walk_tar
from maedistill.errors import DataError, join_first


def verify_shards(out: Path) -> tuple[int, int]:
    """Read all shards in `out` in full. Return how many have an index and how many do not.

    Raise `DataError` naming bad ones.
    """
    indexes = map(load_index, sorted(out.glob(f"*{SUFFIX}")))
    indexed = [(out / name, index, row) for index in indexes for row, name in enumerate(index.shards)]
    named = {path for path, _, _ in indexed}
    bare = [path for path in sorted(out.glob("*.tar")) if path not in named and not path.name.startswith(".")]
    if not indexed and not bare:
        raise DataError(f"{out} holds no shards", "write shards there first: maedistill shards SRC OUT")
    bar = ProgressBar([*indexed, *((path, None, 0) for path in bare)], desc="verifying", unit="shard")
    if faults := [fault for path, index, row in bar if (fault := _find_fault(path, index, row))]:
        raise DataError(
            f"{len(faults)} of {len(indexed) + len(bare)} shards are bad: {join_first(faults, 5, separator='; ')}",
            "copy them again, or make the folder anew: the same command gives the same bytes",
        )
    return len(indexed), len(bare)


def _find_fault(path: Path, index: ShardIndex | None, row: int) -> str | None:
    """Return a description of what is wrong with one shard, including its path; None if it is intact.

    index: whose row `row` says what the shard holds; None for a shard without one.
    """
    if not path.is_file():
        return f"{path} is missing"
    try:
        if index is None:
            with open(path, "rb") as file:
                deque(walk_tar(file, str(path)), maxlen=0)
            return None
        scan = scan_shard(str(path), index.members)
    except DataError as error:
        return error.cause
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    stored = index.scan_of(row)
    if scan.num_bytes != stored.num_bytes:
        return f"{path} has {scan.num_bytes:,} bytes instead of {stored.num_bytes:,}"
    if scan.sha256 != stored.sha256:
        return f"{path} has another checksum than its index says"
    return None if scan == stored else f"{path} holds other samples than its index says"
