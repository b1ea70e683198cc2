"""Turn images into WebDataset shards with an index: see `--help`; data/shards/write.py says what is written."""

import argparse
import os
import sys
from pathlib import Path

from maedistill.commands.arguments import new_parser
from maedistill.data.shards.layout import IMAGES_PER_SHARD, QUALITY
from maedistill.errors import ConfigError
from maedistill.escaping import say

EXAMPLES = """examples:
  maedistill shards photos/ shards/photos              class/image, only images, or train/ and val/ with either
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
        raise ConfigError("OUT is missing", "name the folder for the shards: maedistill shards SRC OUT")
    # torch and Pillow take seconds, which --help and mistakes need not wait for
    from maedistill.data.shards.sources import open_source
    from maedistill.data.shards.summary import print_summary
    from maedistill.data.shards.verify import verify_shards
    from maedistill.data.shards.write import make_shards

    if args.out:
        if args.quality is not None and args.shorter_side is None:
            raise ConfigError("--quality has no effect without --shorter-side", "give both, or leave it out")
        share = args.val_fraction or 0.0
        source = open_source(args.src, root=args.root, val_fraction=share, val_labels=args.val_labels)
        stats = make_shards(
            source,
            out,
            images_per_shard=IMAGES_PER_SHARD if args.images_per_shard is None else args.images_per_shard,
            shorter_side=args.shorter_side,
            quality=QUALITY if args.quality is None else args.quality,
            workers=(os.cpu_count() or 1) if args.workers is None else args.workers,
        )
        print_summary(out, stats, source.notes)
    if args.verify:
        indexed, bare = verify_shards(out)
        rest = f", {bare} without an index are whole" if bare else ""
        say(f"{out}: all {indexed} shards match their index" + rest)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; `--help` includes examples."""
    parser = new_parser("maedistill shards", None)
    parser.usage = "maedistill shards SRC OUT [options]\n       maedistill shards --verify OUT\n\n" + EXAMPLES
    add = parser.add_argument
    add("src", metavar="SRC", help="image folder, cifar10, imagenet or digits (./digits is a folder)")
    add("out", metavar="OUT", nargs="?", help="new or empty folder for the shards, or one to continue")
    add("--images-per-shard", type=int, metavar="N", help=f"at most (default {IMAGES_PER_SHARD})")
    add("--shorter-side", type=int, metavar="N", help="shrink larger images to N pixels and re-encode them as JPEG")
    add("--quality", type=int, metavar="Q", help=f"of re-encoded JPEGs, 1 to 100 (default {QUALITY})")
    add("--val-fraction", type=float, metavar="F", help="hold out a share of a folder without splits")
    add("--val-labels", metavar="FILE", help="classes of a folder val without class folders, e.g. LOC_val_solution.csv")
    add("--root", metavar="DIR", help="files of imagenet or cifar10 (default: cifar10's are downloaded to ~/.cache)")
    add("--workers", type=int, metavar="N", help="threads that decode (default: all cores)")
    add("--verify", action="store_true", help="check the shards in OUT afterwards; without SRC only that")
    args = parser.parse_args(sys.argv[2:])
    if args.verify and not args.out:
        of_writing = set(vars(args)) - {"src", "out", "verify"}
        if given := [name for name in of_writing if getattr(args, name) is not None]:
            cause = f"--{min(given).replace('_', '-')} has no effect: --verify without SRC writes nothing"
            raise ConfigError(cause, "leave it out, or name SRC and OUT")
    return args
