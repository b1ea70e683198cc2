"""Turns images into WebDataset shards with an index: see `--help`; data/shards/write.py says what is written."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maedistill.data.shards.folders import count_by_suffix
from maedistill.data.shards.index import SUFFIX, ShardIndex, load_index
from maedistill.data.shards.sources import open_source
from maedistill.data.shards.write import (
    IMAGES_PER_SHARD,
    QUALITY,
    REPORT_FILE,
    ConversionStats,
    make_shards,
    verify_shards,
)
from maedistill.errors import ConfigError, join_first

MOST_CLASSES = 10  # named in the summary

EXAMPLES = """examples:
  maedistill shards photos/ shards/photos              class/image, images alone, or train/ and val/ of either
  maedistill shards photos/ shards/photos --val-fraction 0.1
  maedistill shards imagenet shards/in1k --root ILSVRC2012/ --workers 16
  maedistill shards imagenet shards/in1k-256 --root ILSVRC2012/ --shorter-side 256
  maedistill shards cifar10 shards/cifar10             downloads CIFAR-10 unless --root has it
  maedistill shards digits shards/digits               1,797 scans that come with scikit-learn
  maedistill shards --verify shards/photos             checks every byte; exit 3 if a shard is damaged

A killed run continues with the same command. Images keep their bytes, except: CMYK, 16-bit, palette, transparent
(laid over white) and animated (first frame) files, and all but JPEG, PNG and WebP, become lossless PNG. Damaged files
are skipped and named, other files are counted.
"""


def main() -> None:
    """Write or verify shards, and print what was done and what to do next."""
    args = parse_arguments()
    out = Path(args.out or args.src)
    if not (args.out or args.verify):
        raise ConfigError("OUT is missing", "say where the shards shall go: maedistill shards SRC OUT")
    if args.out:
        if args.quality is not None and args.shorter_side is None:
            raise ConfigError("--quality has no effect without --shorter-side", "give both, or leave it out")
        stats = make_shards(
            source := open_source(args.src, root=args.root, val_fraction=args.val_fraction, val_labels=args.val_labels),
            out,
            images_per_shard=args.images_per_shard,
            shorter_side=args.shorter_side,
            quality=QUALITY if args.quality is None else args.quality,
            workers=args.workers,
        )
        print_summary(out, stats, source.notes)
    if args.verify:
        print(f"{out}: all {verify_shards(out)} shards are as their index says")


def parse_arguments() -> argparse.Namespace:
    """Read the command line; `--help` includes examples."""
    parser = argparse.ArgumentParser(
        usage="maedistill shards SRC OUT [options]\n       maedistill shards --verify OUT\n\n" + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="image folder, cifar10, imagenet or digits (./digits is a folder)")
    add("out", metavar="OUT", nargs="?", help="new or empty folder for the shards, or one to continue")
    add("--images-per-shard", type=int, default=IMAGES_PER_SHARD, metavar="N", help="at most (default %(default)s)")
    add("--shorter-side", type=int, metavar="N", help="shrink larger images to N pixels and re-encode them as JPEG")
    add("--quality", type=int, metavar="Q", help=f"of re-encoded JPEGs, 1 to 100 (default {QUALITY})")
    add("--val-fraction", type=float, default=0.0, metavar="F", help="hold out a share of a folder without splits")
    add("--val-labels", metavar="FILE", help="classes of a folder val without class folders, e.g. LOC_val_solution.csv")
    add("--root", metavar="DIR", help="files of imagenet or cifar10 (default: cifar10's are downloaded to ~/.cache)")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="threads that decode (default: all cores)")
    add("--verify", action="store_true", help="check the shards in OUT afterwards; without SRC only that")
    return parser.parse_args(sys.argv[2:])


def print_summary(out: Path, stats: dict[str, ConversionStats], notes: Sequence[str] = ()) -> None:
    """Print what was found, written, converted, skipped and passed over, the classes, and the next command."""
    for split, part in stats.items():
        print(f"{split}: {part.images:,} images, {part.grayscale:,} of them grayscale, shards: {len(part.lengths):,}")
        print(
            f"  found {part.found:,} files, written {part.images:,}, converted {len(part.converted):,}, "
            f"skipped {len(part.skipped):,}, passed over {sum(part.passed_over.values()):,}"
        )
        if part.converted:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in Counter(part.converted.values()).most_common())
            print(f"  converted {len(part.converted):,}, all named in {out / REPORT_FILE}: {reasons}")
        if part.skipped:
            print(f"  skipped {len(part.skipped):,}, all named in {out / REPORT_FILE}:")
            for path, reason in list(part.skipped.items())[:5]:
                print(f"    {path}: {reason}")
        if part.passed_over:
            print(f"  passed over, no images of a format that is read: {count_by_suffix(Counter(part.passed_over))}")
        if part.turned:
            share = part.turned / part.images
            print(
                f"  {part.turned:,} ({share:.1%}) state an EXIF orientation, and their pixels are stored as they were:"
            )
            print("    training sees them lying on their side unless data.exif=apply is set")
    print_classes({split: load_index(out / f"{split}{SUFFIX}") for split in stats})
    for note in notes:
        print(f"note: {note}")
    val = f" data.val='{out}/val-*.tar'" if "val" in stats else ""
    print(f"next: maedistill pretrain CONFIG data.train='{out}/train-*.tar'{val} run=runs/NAME")


def print_classes(indexes: dict[str, ShardIndex]) -> None:
    """Print the names of the classes, the range of their sizes, and those that have no image in a split."""
    classes = next(iter(indexes.values())).classes
    if not classes:
        print("classes: none, the images are unlabelled")
        return
    print(f"classes: {len(classes):,} ({join_first(classes, MOST_CLASSES)})")
    for split, index in indexes.items():
        counts = np.bincount(index.labels[index.labels >= 0], minlength=len(classes))  # [classes]
        if not counts.any():
            print(f"  {split}: unlabelled")
            continue
        least, most = counts[counts > 0].min(), counts.max()
        print(f"  {split}: {least:,} {f'to {most:,} ' if most > least else ''}images per class")
        if absent := [classes[label] for label in np.flatnonzero(counts == 0)]:
            print(f"  warning: {split} has no image of {len(absent):,} classes: {join_first(absent, 5)}")
