"""The depth of 16-bit images: one for all images of a source, so that their brightness stays comparable."""

import functools
from concurrent.futures import ThreadPoolExecutor

from maedistill.data.images.convert import bits_in_use
from maedistill.data.images.decode import BadImage
from maedistill.data.images.depth import DARK, UNKNOWN, is_wide_png
from maedistill.data.shards.records import Record, Source, printable
from maedistill.escaping import warn

_EIGHT_BITS = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif")  # suffixes of formats without 16 bits
EIGHT_BIT_STARTS = (b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")


def used_depth(source: Source, workers: int) -> int:
    """Return the depth that the 16-bit images of a source use together, 0 if it has none.

    Warn if a few images set it, which darkens the others. Only files that may have 16 bits are opened.
    """
    if source.head is None:
        return 0
    candidates = [record for records in source.splits.values() for record in records if not is_said_narrow(record)]
    with ThreadPoolExecutor(workers) as pool:
        depths = list(pool.map(functools.partial(_depth, source), candidates))
    if dark := depths.count(UNKNOWN):
        first = printable(candidates[depths.index(UNKNOWN)].origin)
        warn(
            f"{dark} images become nearly black, first {first}: of their kind of 16-bit colour only the high bytes are "
            f"read, all below {DARK} of 255; write them as plain RGB"
        )
    wide = sorted(depth for depth in depths if depth > 0)
    bits = max(wide, default=0)
    if wide and (usual := wide[len(wide) // 2]) < bits:
        first = printable(candidates[depths.index(bits)].origin)
        warn(
            f"{wide.count(bits)} of {len(wide)} 16-bit images use {bits} bits, first {first}, and most others {usual}: "
            f"one scale for all makes these {1 << bits - usual} times darker; write either kind to shards of its own"
        )
    return bits


def is_said_narrow(record: Record) -> bool:
    """Return whether a file's suffix is of a format without 16 bits; such files are not opened to measure them."""
    return record.origin.lower().endswith(_EIGHT_BITS)


def _depth(source: Source, record: Record) -> int:
    assert source.head is not None
    try:
        head = source.head(record)
        is_narrow_png = head.startswith(b"\x89PNG") and not is_wide_png(head)
        return 0 if is_narrow_png or head.startswith(EIGHT_BIT_STARTS) else bits_in_use(source.read(record))
    except (OSError, BadImage):  # it is reported when it is converted
        return 0
