"""Quantify what networks know about images during training, after Cheng et al. (2020)."""

import argparse
import os
import sys
from pathlib import Path

from maedistill.commands.arguments import at_least, new_parser, path, share, spec_of
from maedistill.durable import require_local

EXAMPLES = """\
Each image is divided into cells, the patches of the networks. Noise is added to each cell, as much as the network's
features tolerate, until the mean entropy of the noise is the same for all networks and checkpoints. A cell that
tolerates clearly less than the background is a concept. docs/knowledge.md explains the figures.

NETWORK is a run, of which all kept checkpoints are analysed (train with log.keep and log.save_every_epochs), or an
export, timm:NAME, hf-hub:ID. SHARDS is a folder (its val-*.tar) or a pattern.

examples:
  maedistill knowledge runs/labels runs/kd --images 'in1k/val-*.tar'
  maedistill knowledge runs/labels runs/kd --images 'cub/*.tar' --foreground cub/masks --out knowledge/cub
  torchrun --nproc-per-node 8 -m maedistill knowledge runs/labels runs/kd --images 'in1k/val-*.tar'

After an interruption the same command continues, with any number of processes; the figures are the same.
"""


def main() -> None:
    """Run the command. What is wrong with the command line is said before torch is imported."""
    arguments = parse_arguments()
    require_local(arguments.out, "--out")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see stage.py
    from maedistill.analysis.entropies import EntropySpec
    from maedistill.analysis.knowledge import KnowledgeSpec, quantify
    from maedistill.evaluation.context import open_context

    noise = EntropySpec(arguments.entropy, arguments.steps, arguments.draws, arguments.seed)
    spec = spec_of(KnowledgeSpec, arguments, noise=noise)
    # fits: a process may have the last batch to itself, for as long as it takes
    quantify(
        spec, open_context(batch=arguments.batch, workers=0, threads=arguments.threads, precision="fp32", fits=True)
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser("maedistill knowledge", __doc__, EXAMPLES)
    add = parser.add_argument
    add("networks", nargs="+", metavar="NETWORK", help="runs with their checkpoints, or other networks")
    add("--images", required=True, metavar="SHARDS", help="images to analyse; labels are not needed")
    add("--out", type=path, default=Path("runs/knowledge"), metavar="DIR", help="default runs/knowledge")
    add("--count", type=at_least(1), default=50, metavar="N", help="number of images, chosen by the seed (default 50)")
    masks = "center (default), none, or a folder of masks KEY.png, whose foreground is not 0"
    add("--foreground", default="center", metavar="WHERE", help=masks)
    add("--grid", type=at_least(1), metavar="N", help="divide images into N x N cells (default: the networks' patches)")
    add("--block", type=int, default=-1, metavar="N", help="block whose output is used (default -1, the last)")
    add("--pool", choices=("mean", "class"), default="mean", help="mean of the patches, or the class token")
    add("--entropy", type=entropy, default=-2.8, metavar="H", help="mean entropy of the cells, in nats (default -2.8)")
    add("--steps", type=at_least(1), default=50, metavar="N", help="steps of Adam for each image (default 50)")
    add("--draws", type=at_least(1), default=32, metavar="N", help="draws of noise in each step (default 32)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="seed of noise and choice of images (default 0)")
    add("--image-size", type=at_least(1), metavar="N", help="side of the images (default: the networks' own)")
    add("--crop", type=share, metavar="F", help="share of the shorter side (default: as the first network)")
    add("--exif", choices=("ignore", "apply"), help="turn photographs upright (default: as the first network)")
    add("--batch", type=at_least(1), default=4, metavar="N", help="images at once, each with all draws (default 4)")
    add("--threads", type=at_least(1), default=1, metavar="N", help="CPU threads of each process (default 1)")
    return parser.parse_args(sys.argv[2:])


def entropy(text: str) -> float:
    """Read a mean entropy between those of the least and the largest noise, 0.001 and 1 in pixels of [0, 1]."""
    value = float(text)
    if not -5.4 <= value <= 1.4:
        raise argparse.ArgumentTypeError(f"{text} is no mean entropy from -5.4 to 1.4 nats")
    return value
