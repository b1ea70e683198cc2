"""Turns images into WebDataset shards with an index: see `--help`; data/shards/write.py says what is written."""

import argparse
import os
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from maedistill.data.shards.layout import IMAGES_PER_SHARD, QUALITY, REPORT_FILE
from maedistill.errors import ConfigError

if TYPE_CHECKING:  # imported by `main` only: it takes seconds, which --help and mistakes need not wait for
    from maedistill.data.shards.sources import Source
    from maedistill.data.shards.write import ConversionStats

EXAMPLES = """examples:
  maedistill shards photos/ shards/photos              class/image, images alone, or train/ and val/ of either
  maedistill shards photos/ shards/photos --val-fraction 0.1
  maedistill shards imagenet shards/in1k --root ILSVRC2012/ --workers 16
  maedistill shards imagenet shards/in1k-256 --root ILSVRC2012/ --shorter-side 256
  maedistill shards cifar10 shards/cifar10             downloads CIFAR-10 unless --root has it
  maedistill shards digits shards/digits               1,797 scans that come with scikit-learn
  maedistill shards --verify shards/photos             checks every byte; exit 3 if a shard is damaged

A killed run continues with the same command. Images keep their bytes, except: CMYK, 16-bit, palette, transparent
(laid over white) and animated (first frame) files, BMP, GIF and TIFF become lossless PNG. Damaged files are skipped
and named.
"""


def main() -> None:
    """Write or verify shards, and print what was done and what to do next."""
    args = parse_arguments()
    out = Path(args.out or args.src)
    if not (args.out or args.verify):
        raise ConfigError("OUT is missing", "say where the shards shall go: maedistill shards SRC OUT")
    from maedistill.data.shards.sources import open_source
    from maedistill.data.shards.write import make_shards, verify_shards

    if args.out:
        if args.quality is not None and args.shorter_side is None:
            raise ConfigError("--quality has no effect without --shorter-side", "give both, or leave it out")
        source = open_source(args.src, root=args.root, val_fraction=args.val_fraction)
        stats = make_shards(
            source,
            out,
            images_per_shard=args.images_per_shard,
            shorter_side=args.shorter_side,
            quality=QUALITY if args.quality is None else args.quality,
            workers=args.workers,
        )
        print_summary(out, stats)
        print_next(out, source)
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
    add("--root", metavar="DIR", help="files of imagenet or cifar10 (default: cifar10's are downloaded to ~/.cache)")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="threads that decode (default: all cores)")
    add("--verify", action="store_true", help="check the shards in OUT afterwards; without SRC only that")
    return parser.parse_args(sys.argv[2:])


def print_summary(out: Path, stats: "dict[str, ConversionStats]") -> None:
    """Print the counts by split, the numbers of converted and skipped images, and the next command."""
    for split, part in stats.items():
        print(f"{split}: {part.images:,} images, {part.grayscale:,} of them grayscale, shards: {len(part.lengths):,}")
        if part.converted:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in Counter(part.converted.values()).most_common())
            print(f"  converted {len(part.converted):,}, all named in {out / REPORT_FILE}: {reasons}")
        if part.skipped:
            print(f"  skipped {len(part.skipped):,}, all named in {out / REPORT_FILE}:")
            for path, reason in list(part.skipped.items())[:5]:
                print(f"    {path}: {reason}")


def print_next(out: Path, source: "Source") -> None:
    """Print what the validation images cannot be used for, if there is such a thing, and the next command."""
    from maedistill.data.shards.scan import NO_LABEL

    labels = {split: {record.label for record in records} - {NO_LABEL} for split, records in source.splits.items()}
    if unseen := labels.get("val", set()) - labels.get("train", set()):
        print(
            f"note: {len(unseen):,} of the {len(labels['val']):,} classes in val have no image in train; nothing can "
            "learn them (--val-fraction chooses images by name, not by class)"
        )
    folder = shlex.quote(str(out))
    val = f" data.val={folder}" if "val" in source.splits else ""
    print(f"next: maedistill pretrain own/dmae data.train={folder}{val} run=runs/NAME --dry-run")
