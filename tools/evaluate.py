"""Evaluates a classifier on labelled shards: every image exactly once. `tools/evaluate.py --help` shows how."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from maedistill.errors import ConfigError, exit_code_of

EXAMPLES = """\
MODEL is the folder of a fine-tuning run or of an export, or timm:NAME, or hf-hub:ID. Image size, crop and normalisation
are the model's own.

examples:
  python tools/evaluate.py runs/dmae_s_finetuned 'in1k/val-*.tar'
  python tools/evaluate.py runs/dmae_s_finetuned/export 'in1k/val-*.tar' --predictions predictions.csv
  python tools/evaluate.py timm:vit_small_patch16_224 'in1k/val-*.tar' --json result.json
  torchrun --nproc-per-node 8 tools/evaluate.py MODEL SHARDS

The counts are the same for any number of processes. Exit codes: 0 done, 2 usage, 3 data, 4 numerics, 5 a peer or the
hardware.
"""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split(" `")[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="run:PATH, local-dir:PATH, timm:NAME, hf-hub:ID, or a folder")
    add("shards", metavar="SHARDS", help="labelled shards: one tar, a quoted glob or a brace range")
    add("--index", metavar="FILE", help="the shards' index, where it does not lie beside them")
    add("--ema", action="store_true", help="a run's moving average of the weights")
    add("--image-size", type=at_least(1), metavar="N", help="other than the model's own; positions are resampled")
    add("--crop", type=share, metavar="F", help="share of the shorter side that is seen, other than the model's own")
    add("--batch", type=at_least(1), default=64, metavar="N", help="images at once in each process (default 64)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU, else fp32")
    add("--predictions", type=Path, metavar="FILE.csv", help="write each image's label, loss and five best classes")
    add("--json", type=Path, metavar="FILE", help="write the result; top1 and top5 are counts")
    add("--no-latency", action="store_true", help="do not time the network")
    add("--workers", type=at_least(0), metavar="N", help="processes that decode, for each process (default: its cores)")
    add("--threads", type=at_least(1), metavar="N", help="torch's CPU threads in each process (default: its cores)")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher adds it; LOCAL_RANK rules
    return parser.parse_args()


def main() -> None:
    """Checks the command line before torch is imported."""
    arguments = parse()
    for flag, file in (("--predictions", arguments.predictions), ("--json", arguments.json)):
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            problem = "is a folder" if file.is_dir() else f"cannot be written, {file.parent} is no folder"
            raise ConfigError(f"{flag}: {file} {problem}", "name a file in a folder that exists")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see command_line.py
    from maedistill.evaluation.scorecard import score

    score(
        arguments.model,
        arguments.shards,
        index_file=arguments.index,
        weights="ema" if arguments.ema else "model",
        image_size=arguments.image_size,
        crop=arguments.crop,
        batch=arguments.batch,
        workers=arguments.workers,
        threads=arguments.threads,
        precision=arguments.precision,
        latency=not arguments.no_latency,
        predictions_file=arguments.predictions,
        json_file=arguments.json,
    )


def at_least(least: int) -> Callable[[str], int]:
    """Reads a whole number and refuses smaller ones."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} on")
        return int(text)

    return number


def share(text: str) -> float:
    """Reads a number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share, above 0 and at most 1")
    return value


if __name__ == "__main__":
    code = exit_code_of(main)
    if code == 0:
        sys.stdout.flush()
        os._exit(0)  # without the interpreter's teardown: command_line.py says why
    sys.exit(code)
