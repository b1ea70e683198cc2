"""Exports a run's network as a timm model with its model card."""

import argparse
import sys
from typing import TYPE_CHECKING

from maedistill.commands.evaluate_arguments import PEER
from maedistill.escaping import say

if TYPE_CHECKING:
    from maedistill.weights.from_run import Weights

EXAMPLES = """\
examples:
  maedistill export runs/dmae_s                           its encoder, to runs/dmae_s/export
  maedistill export runs/dmae_s --global-pool token    the class token in place of the patches' mean
  maedistill export runs/dmae_s_finetuned --out dmae_s    the classifier
  maedistill export runs/dmae_s_finetuned --ema           the moving average of its weights
  maedistill export runs/exits --exit 5                   its first 6 blocks and their exit, to runs/exits/export_exit5

The folder loads wherever timm is: timm.create_model("local-dir:FOLDER", pretrained=True). Exit codes: 0 done, 2 usage,
3 no run, no such weights, or nothing could be written.
"""


def parse() -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="maedistill export",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument("run", help="a run folder of maedistill pretrain or maedistill finetune")
    parser.add_argument("--out", help="folder to write, RUN/export by default; an earlier export there is replaced")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (runs with optim.ema)")
    parser.add_argument(
        "--global-pool",
        choices=["avg", "token"],
        help="output of a pre-trained student: the mean of its patch tokens (the default), or its class token",
    )
    parser.add_argument(
        "--exit", type=int, metavar="BLOCK", help="the network that ends at an exit (runs with student.exits)"
    )
    parser.add_argument("--peer", type=int, default=0, metavar="N", help=PEER)
    return parser.parse_args(sys.argv[2:])


def main() -> None:
    """Write the export and print a summary of it."""
    arguments = parse()
    from maedistill.exporting.folder import export, read_record  # imports torch, for which --help need not wait

    weights: Weights = "ema" if arguments.ema else "model"
    out = export(
        arguments.run,
        arguments.out,
        weights=weights,
        global_pool=arguments.global_pool,
        exit=arguments.exit,
        peer=arguments.peer,
    )
    record = read_record(out)
    megabytes = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    say(
        f"exported {record['checkpoint']} of {record['run']} to {out} ({weights}, {record['global_pool']} pooling)",
        f"parity   max difference {record['max_difference']} over {record['values']:,} values, opened again by timm",
        f"size     {megabytes:.2f} MB",
        f"license  {record['license']}",
        "",
        "import timm",
        f'model = timm.create_model("local-dir:{out}", pretrained=True).eval()',
    )
