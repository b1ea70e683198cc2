"""Evaluates a network on labelled shards: every image exactly once. `tools/evaluate.py --help` shows how."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maedistill.errors import ConfigError, exit_code_of

EXAMPLES = """\
MODEL is the folder of a run or of an export, or timm:NAME, or hf-hub:ID. Image size, crop and normalisation are the
model's own.

examples:
  python tools/evaluate.py runs/dmae_s_finetuned 'in1k/val-*.tar'
  python tools/evaluate.py runs/dmae_s_finetuned/export 'in1k/val-*.tar' --per-class classes.csv --confusions worst.png
  python tools/evaluate.py timm:vit_small_patch16_224 'in1k/val-*.tar' --real --json result.json
  python tools/evaluate.py timm:vit_small_patch16_224 'imagenet-r/*.tar' --subset
  python tools/evaluate.py runs/dmae_s_finetuned 'in1k/val-*.tar' --against timm:vit_large_patch16_224
  torchrun --nproc-per-node 8 tools/evaluate.py MODEL SHARDS

The counts are the same for any number of processes. Exit codes: 0 done, 2 usage, 3 data, 4 numerics, 5 a peer or the
hardware.
"""
FILES = {
    "predictions": "write each image's label, loss and five best classes",
    "per_class": "write each class's counts, confidence and what it is most often taken for",
    "confusions": "draw the classes that are most often confused, with images",
    "json": "write the result; top1 and top5 are counts",
}
SUFFIXES = {"predictions": ".csv", "per_class": ".csv", "confusions": ".png", "json": ".json"}


def parse_score(words: list[str]) -> argparse.Namespace:
    """The command line for a classifier."""
    parser = new_parser("evaluate.py", __doc__.split(" `")[0], EXAMPLES)
    add = parser.add_argument
    add("model", metavar="MODEL", help="run:PATH, local-dir:PATH, timm:NAME, hf-hub:ID, or a folder")
    add("shards", metavar="SHARDS", help="labelled shards: one tar, a quoted glob or a brace range")
    add("--index", metavar="FILE", help="the shards' index, where it does not lie beside them")
    add("--against", metavar="MODEL2", help="compare the answers with another classifier's: same best class, KL")
    add("--subset", action="store_true", help="the shards hold some of the model's classes: match them by name")
    add("--real", action="store_true", help="ImageNet's validation set: count against ImageNet-ReaL's labels, too")
    add("--bins", type=at_least(1), default=15, metavar="N", help="of the calibration error (default 15)")
    for name, text in FILES.items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=Path, metavar=f"FILE{SUFFIXES[name]}", dest=name, help=text)
    add("--no-latency", action="store_true", help="do not time the network")
    add_common(parser)
    return parser.parse_args(words)


def new_parser(program: str, about: str, examples: str) -> argparse.ArgumentParser:
    """A parser that prints its examples as they are."""
    return argparse.ArgumentParser(
        prog=program, description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every form of the tool takes."""
    add = parser.add_argument
    add("--ema", action="store_true", help="a run's moving average of the weights")
    add("--image-size", type=at_least(1), metavar="N", help="other than the model's own; positions are resampled")
    add("--crop", type=share, metavar="F", help="share of the shorter side that is seen, other than the model's own")
    add("--batch", type=at_least(1), default=64, metavar="N", help="images at once in each process (default 64)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU, else fp32")
    add("--workers", type=at_least(0), metavar="N", help="processes that decode, for each process (default: its cores)")
    add("--threads", type=at_least(1), metavar="N", help="torch's CPU threads in each process (default: its cores)")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher adds it; LOCAL_RANK rules


def main() -> None:
    """Checks the command line before torch is imported."""
    arguments = parse_score(sys.argv[1:])
    files = {name: getattr(arguments, name, None) for name in FILES}
    require_writable(files)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see command_line.py
    score_classifier(arguments, files)


def score_classifier(arguments: argparse.Namespace, files: dict[str, Path | None]) -> None:
    """The scorecard of a classifier."""
    from maedistill.evaluation.scorecard import score

    score(
        arguments.model,
        arguments.shards,
        index_file=arguments.index,
        against=arguments.against,
        subset=arguments.subset,
        real=arguments.real,
        bins=arguments.bins,
        latency=not arguments.no_latency,
        files=files,
        **common(arguments),
    )


def common(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_common` read, by the names of the functions that are called."""
    names = ("image_size", "crop", "batch", "precision", "workers", "threads")
    return {name: getattr(arguments, name) for name in names} | {"weights": "ema" if arguments.ema else "model"}


def require_writable(files: dict[str, Path | None]) -> None:
    """Raises ConfigError for a file that cannot be written: said now, it costs no evaluation."""
    for name, file in files.items():
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            problem = "is a folder" if file.is_dir() else f"cannot be written, {file.parent} is no folder"
            raise ConfigError(f"--{name.replace('_', '-')}: {file} {problem}", "name a file in a folder that exists")


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
