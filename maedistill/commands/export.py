"""Export a run's network with its model card: as a timm model, as an ONNX or torch.export graph, in int8."""

import argparse
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from maedistill.commands.arguments import PEER, at_least, new_parser, number
from maedistill.errors import ConfigError, join_first
from maedistill.escaping import say

if TYPE_CHECKING:
    from maedistill.evaluation.context import EvalContext
    from maedistill.weights.from_run import Weights

EXAMPLES = """\
examples:
  maedistill export runs/dmae_s                           its encoder, to runs/dmae_s/export
  maedistill export runs/dmae_s --global-pool token       the class token in place of the patches' mean
  maedistill export runs/dmae_s_finetuned --out dmae_s    the classifier
  maedistill export runs/dmae_s_finetuned --ema           the moving average of its weights
  maedistill export runs/exits --exit 5                   its first 6 blocks and their exit, to runs/exits/export_exit5
  maedistill export runs/dmae_s_finetuned --format timm,onnx,torch_export --val 'in1k/val-*.tar'
  maedistill export runs/dmae_s_finetuned --push-to-hub USER/NAME
  maedistill export runs/dmae_s_finetuned --int8 --calibration 'in1k/train-*.tar' --val 'in1k/val-*.tar'

The folder loads with timm: timm.create_model("local-dir:FOLDER", pretrained=True); its graphs run with onnxruntime or
torch, on any number of images. Exit codes: 0 done, 2 usage, 3 no run, no such weights, a format that changes the run's
outputs, int8 that is not accurate enough, nothing could be written, or the hub refused.
"""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser("maedistill export", __doc__, EXAMPLES)
    parser.add_argument("run", help="a run folder of maedistill pretrain or maedistill finetune")
    place = (
        "folder to write: by default RUN/export, with --exit RUN/export_exitBLOCK, with --peer RUN/export_peerN; "
        "an earlier export there is replaced"
    )
    parser.add_argument("--out", help=place)
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
    add_graphs(parser)
    pushed = "push it with its card to the Hugging Face hub, with the token in HF_TOKEN or of a login; private"
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help=pushed)
    parser.add_argument("--public", action="store_true", help="make what --push-to-hub pushes public")
    return parser.parse_args(sys.argv[2:])


def add_graphs(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of graphs, of int8, and of the evaluation of all formats."""
    add = parser.add_argument
    add("--format", default="timm", metavar="NAME,NAME", help="timm (the default), onnx, torch_export")
    inside = "graphs take uint8 images, and scale and normalise them"
    add("--with-preprocessing", action="store_true", help=inside)
    add("--val", metavar="SHARDS", help="evaluate every format on these shards, against the run's network")
    add("--batch", type=at_least(1), metavar="N", help="images per batch of --val and --calibration (default 64)")
    add("--int8", action="store_true", help="also quantise the ONNX graph; needs --calibration and --val")
    add("--calibration", metavar="SHARDS", help="training images, for the ranges of int8")
    add("--calibration-images", type=at_least(1), metavar="N", help="images, spread over these shards (default 256)")
    add("--calibration-method", choices=("percentile", "entropy"), help="how ranges are chosen (default percentile)")
    most = "points of top-1 that int8 may lose on --val; layers stay in float until it does not lose more (default 0.5)"
    add("--max-drop", type=points, metavar="X", help=most)


def points(text: str) -> float:
    """Read a number of percentage points, from 0 on."""
    with suppress(ValueError):
        if float(text) == 0:
            return 0.0
    return number(text, most=100.0, reason="number of points, from 0 to 100")


def main() -> None:
    """Write the export, print a summary of it, and evaluate it if asked to."""
    arguments = parse()
    of_int8 = ("calibration", "calibration_images", "calibration_method", "max_drop")
    given = {name: value for name in of_int8 if (value := getattr(arguments, name)) is not None}
    if given and not arguments.int8:
        raise ConfigError(f"--{next(iter(given)).replace('_', '-')} needs --int8", "add --int8, or leave it out")
    if arguments.int8 and not (arguments.calibration and arguments.val):
        raise ConfigError("--int8 needs --calibration SHARDS and --val SHARDS", "name training and validation shards")
    if arguments.batch is not None and arguments.val is None:
        raise ConfigError("--batch needs --val", "add --val SHARDS, or leave it out")
    if arguments.public and arguments.push_to_hub is None:
        raise ConfigError("--public needs --push-to-hub", "add --push-to-hub USER/NAME, or leave it out")
    from maedistill.exporting.folder import export, read_record  # --help need not wait for torch
    from maedistill.exporting.hub import push, require_pushable
    from maedistill.exporting.scores import require_scorable, score_formats
    from maedistill.weights.from_run import run_members

    if arguments.val is not None:
        require_scorable(arguments.run, arguments.val, calibration=arguments.calibration)
    context = open_context(arguments) if arguments.val is not None else None
    weights: Weights = "ema" if arguments.ema else "model"
    int8 = None
    if arguments.int8 and context is not None:
        from maedistill.exporting.int8 import Int8Spec

        renamed = {"calibration_images": "images", "calibration_method": "method"}
        given = {renamed.get(name, name): value for name, value in given.items()}
        int8 = Int8Spec(val=arguments.val, context=context, members=run_members(arguments.run), **given)
    part: dict[str, Any] = {"weights": weights, "exit": arguments.exit, "peer": arguments.peer}

    def require_hub() -> None:
        if arguments.push_to_hub is not None:  # last, since it makes the repository
            require_pushable(arguments.push_to_hub, arguments.run, public=arguments.public)

    out = export(
        arguments.run,
        arguments.out,
        **part,
        global_pool=arguments.global_pool,
        formats=arguments.format.split(","),
        with_preprocessing=arguments.with_preprocessing,
        int8=int8,
        needs_classifier=arguments.val is not None,
        before_work=require_hub,
    )
    record = read_record(out)
    megabytes = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    say(
        f"exported {record['checkpoint']} of {record['run']} to {out} ({weights}, {record['global_pool']} pooling)",
        *parity(record),
        f"size     {megabytes:.2f} MB",
        f"license  {record['license']}",
    )
    if "timm" in record["formats"]:
        say("", "import timm", f'model = timm.create_model("local-dir:{out}", pretrained=True).eval()')
    if context is not None:
        score_formats(out, arguments.run, arguments.val, context, **part)
    if arguments.push_to_hub is not None:
        address = push(out, arguments.push_to_hub, public=arguments.public)
        say(f"pushed   {address} ({'public' if arguments.public else 'private'})")


def parity(record: dict[str, Any]) -> list[str]:
    """Return the lines that say how far each format is from the run, and what int8 cost."""
    lines = []
    if "max_difference" in record:
        values = f"{record['max_difference']} over {record['values']:,} values"
        lines.append(f"parity   max difference {values}, opened again by timm")
    for kind, distance in record.get("graphs", {}).items():
        lines.append(f"parity   max difference {distance:.2g} of the largest output, {kind} opened again")
    if int8 := record.get("int8"):
        worst = [f"{name} {100 * error:.2g} %" for name, error in int8["layer_errors"].items()]
        in_float = join_first(int8["in_float"], 100) or "none"
        lines += [
            f"int8     top-1 {100 * int8['top1_fp32']:.2f} % -> {100 * int8['top1_int8']:.2f} % on {int8['images']:,} "
            f"images, {0 - int8['drop']:+.2f} points",
            f"int8     error of the output with one layer in int8: {join_first(worst, 100)}",
            f"int8     layers in float: {in_float}; and all that is no layer",
        ]
    return lines


def open_context(arguments: argparse.Namespace) -> "EvalContext":
    """Return the settings of evaluations: fp32, since they compare number formats."""
    from maedistill.evaluation import context

    return context.open_context(batch=arguments.batch or 64, workers=None, threads=None, precision="fp32")
