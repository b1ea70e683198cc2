"""Compare finished shards with their index by checksum and content, for `make_shards --verify`.

OUT -> each *.index.safetensors -> each shard scanned again -> number of shards, or a DataError that names the bad ones
"""

from pathlib import Path

from tqdm import tqdm

from maedistill.data.shards.index import SUFFIX, ShardIndex, load_index
from maedistill.data.shards.scan import scan_shard
from maedistill.errors import DataError, join_first


def verify_shards(out: Path) -> int:
    """Read every shard of every index in `out` in full. Return their number, or raise `DataError` naming bad ones."""
    rows = [
        (index, row) for index in map(load_index, sorted(out.glob(f"*{SUFFIX}"))) for row in range(len(index.shards))
    ]
    if not rows:
        raise DataError(f"{out} holds no *{SUFFIX}", "write shards there first: make_shards.py SRC OUT")
    checked = [_find_fault(index, row, out) for index, row in tqdm(rows, desc="verifying", unit="shard")]
    if faults := [fault for fault in checked if fault]:
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
    if scan.num_bytes != index.shard_bytes[row]:
        return f"{path} has {scan.num_bytes:,} bytes instead of {index.shard_bytes[row]:,}"
    if scan.sha256 != index.shard_sha256[row]:
        return f"{path} has another checksum than its index says"
    samples = range(index.starts[row], index.starts[row + 1])
    indexed = [(index.key(i), index.offsets[i], index.sizes[i], index.labels[i]) for i in samples]
    scanned = list(zip(scan.keys, scan.offsets, scan.sizes, scan.labels, strict=True))
    return None if scanned == indexed else f"{path} holds other samples than its index says"
