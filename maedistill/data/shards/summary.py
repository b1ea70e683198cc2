"""What `maedistill shards` prints at the end: counts of files, classes, and the next command."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maedistill.data.shards.folders import count_by_suffix
from maedistill.data.shards.index import SUFFIX, ShardIndex, load_index
from maedistill.data.shards.layout import REPORT_FILE
from maedistill.data.shards.write import ConversionStats
from maedistill.errors import join_first
from maedistill.escaping import say

MOST_CLASSES = 10  # named in the summary


def print_summary(out: Path, stats: dict[str, ConversionStats], notes: Sequence[str] = ()) -> None:
    """Print what was found, written, converted, skipped and passed over, the classes, and the next command."""
    for split, part in stats.items():
        say(f"{split}: {part.images:,} images, {part.grayscale:,} of them grayscale, shards: {len(part.lengths):,}")
        say(
            f"  found {part.found:,} files, written {part.images:,}, converted {len(part.converted):,}, "
            f"skipped {len(part.skipped):,}, passed over {sum(part.passed_over.values()):,}"
        )
        if part.converted:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in Counter(part.converted.values()).most_common())
            say(f"  converted {len(part.converted):,}, all named in {out / REPORT_FILE}: {reasons}")
        if part.skipped:
            say(f"  skipped {len(part.skipped):,}, all named in {out / REPORT_FILE}:")
            for path, reason in list(part.skipped.items())[:5]:
                say(f"    {path}: {reason}")
        if part.passed_over:
            say(f"  passed over, not images of a format that is read: {count_by_suffix(Counter(part.passed_over))}")
        if part.turned:
            share = part.turned / part.images
            say(f"  {part.turned:,} ({share:.1%}) state an EXIF orientation, and their pixels are stored as they were:")
            say("    training sees them unrotated unless data.exif=apply is set")
    print_classes({split: load_index(out / f"{split}{SUFFIX}") for split in stats})
    for note in notes:
        say(f"note: {note}")
    folder = shlex.quote(str(out))
    val = f" data.val={folder}" if "val" in stats else ""
    say(f"next: maedistill pretrain own/dmae data.train={folder}{val} run=runs/NAME --dry-run")


def print_classes(indexes: dict[str, ShardIndex]) -> None:
    """Print the names of the classes, the range of their sizes, and those that have no image in a split."""
    classes = next(iter(indexes.values())).classes
    if not classes:
        say("classes: none, the images are unlabelled")
        return
    say(f"classes: {len(classes):,} ({join_first(classes, MOST_CLASSES)})")
    for split, index in indexes.items():
        counts = np.bincount(index.labels[index.labels >= 0], minlength=len(classes))  # [classes]
        if not counts.any():
            say(f"  {split}: unlabelled")
            continue
        least, most = counts[counts > 0].min(), counts.max()
        say(f"  {split}: {least:,} {f'to {most:,} ' if most > least else ''}images per class")
        if absent := [classes[label] for label in np.flatnonzero(counts == 0)]:
            say(f"  warning: {split} has no image of {len(absent):,} classes: {join_first(absent, 5)}")
