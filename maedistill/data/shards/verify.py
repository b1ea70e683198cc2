"""Read shards in full and compare them with their index: `maedistill shards --verify`."""

from pathlib import Path

from maedistill.data.shards.index import SUFFIX, ShardIndex, load_index
from maedistill.data.shards.progress_bar import ProgressBar
from maedistill.data.shards.scan import scan_shard
from maedistill.errors import DataError, join_first


def verify_shards(out: Path) -> int:
    """Read every shard of every index in `out` in full. Return their number, or raise `DataError` naming bad ones."""
    indexes = map(load_index, sorted(out.glob(f"*{SUFFIX}")))
    rows = [(index, row) for index in indexes for row in range(len(index.shards))]
    if not rows:
        raise DataError(f"{out} holds no *{SUFFIX}", "write shards there first: maedistill shards SRC OUT")
    bar = ProgressBar(rows, desc="verifying", unit="shard")
    if faults := [fault for index, row in bar if (fault := _find_fault(index, row, out))]:
        raise DataError(
            f"{len(faults)} of {len(rows)} shards are bad: {join_first(faults, 5, separator='; ')}",
            "copy them again, or make the folder anew: the same command gives the same bytes",
        )
    return len(rows)


def _find_fault(index: ShardIndex, row: int, out: Path) -> str | None:
    """Return a description of what is wrong with one shard, including its path; None if it is intact."""
    path = out / index.shards[row]
    if not path.is_file():
        return f"{path} is missing"
    try:
        scan = scan_shard(str(path))
    except DataError as error:
        return error.cause
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    indexed = index.scan_of(row)
    if scan.num_bytes != indexed.num_bytes:
        return f"{path} has {scan.num_bytes:,} bytes instead of {indexed.num_bytes:,}"
    if scan.sha256 != indexed.sha256:
        return f"{path} has another checksum than its index says"
    return None if scan == indexed else f"{path} holds other samples than its index says"
