"""Measure where time goes on this machine: `loader`, `step`, `scale`, `cost`."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from maedistill.commands.arguments import at_least, new_parser, path, require_writable
from maedistill.escaping import say

if TYPE_CHECKING:
    from maedistill.benchmark.report import Report
    from maedistill.config.pretrain import PretrainConfig

EXAMPLES = """examples:
  images/s per core, by stage, against the plain path:
    maedistill benchmark loader 'in1k/train-*.tar' --workers 2
  FLOPs, images/s and memory, against the plain step:
    maedistill benchmark step imagenet/dmae_vit_b engine.precision=fp32 --batch 2
  speed-up from more processes on this machine:
    maedistill benchmark scale cifar10/dmae --processes 2
  hours to a paper's number, and what limits them:
    maedistill benchmark cost imagenet/dmae_vit_b data.train='in1k/train-*.tar' --gpus 8

Every comparison is made side by side in one run: medians, and the range that holds half of the rounds.
"""


def main() -> None:
    """Measure, print the report and, with --json, write it."""
    arguments = parse_arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in training, see stage.py
    require_writable({"json": arguments.json})
    report = arguments.measure(arguments)
    say(*report.lines())
    if arguments.json:
        report.write_json(arguments.json, command=sys.argv)


def loader(arguments: argparse.Namespace) -> "Report":
    """Measure images per second and core of the loader, by stage, against a plain loader and decoding alone."""
    from maedistill.benchmark.loader import measure_loader

    return measure_loader(
        arguments.shards,
        size=arguments.size,
        views=arguments.views,
        workers=arguments.workers,
        images=arguments.images,
        rounds=arguments.rounds,
        against=arguments.against,
    )


def step(arguments: argparse.Namespace) -> "Report":
    """Measure images per second, FLOPs and memory of an optimizer step, against the step of published loops."""
    from maedistill.benchmark.step import measure_step

    return measure_step(config_of(arguments), batch=arguments.batch, rounds=arguments.rounds)


def scale(arguments: argparse.Namespace) -> "Report":
    """Measure the speed-up from more processes on this machine."""
    from maedistill.benchmark.scale import measure_scale

    return measure_scale(arguments.config, arguments.overrides, processes=arguments.processes, rounds=arguments.rounds)


def cost(arguments: argparse.Namespace) -> "Report":
    """Estimate the hours that a config takes on this kind of machine, and find the bottleneck."""
    from maedistill.benchmark.cost import expected_number, measure_cost

    config = config_of(arguments)
    expected = expected_number(arguments.config, config)
    return measure_cost(config, gpus=arguments.gpus, rounds=arguments.rounds, expected=expected)


def config_of(arguments: argparse.Namespace) -> "PretrainConfig":
    """Load the pre-training config that the command line names."""
    from maedistill.config.loader import load_config
    from maedistill.config.pretrain import PretrainConfig

    return load_config(arguments.config, arguments.overrides, root=PretrainConfig, to_run=False).config


def parse_arguments() -> argparse.Namespace:
    """Read the command line; `--help` includes examples."""
    parser = new_parser("maedistill benchmark", __doc__, EXAMPLES)
    count = at_least(1)
    kinds = parser.add_subparsers(required=True, metavar="loader|step|scale|cost")

    def kind(measure, rounds: int) -> argparse.ArgumentParser:  # noqa: ANN001
        one = kinds.add_parser(measure.__name__, help=measure.__doc__, description=measure.__doc__)
        one.set_defaults(measure=measure)
        one.add_argument("--rounds", type=count, default=rounds, metavar="N", help="rounds (default %(default)s)")
        one.add_argument("--json", type=path, metavar="FILE", help="also write the figures there")
        return one

    def configured(measure, rounds: int) -> argparse.ArgumentParser:  # noqa: ANN001
        one = kind(measure, rounds)
        one.add_argument("config", help="a pre-training YAML file, or the name of a config that comes with maedistill")
        one.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of it")
        return one

    one = kind(loader, 7)
    one.add_argument("shards", help="shards of real images, e.g. 'in1k/train-*.tar'")
    one.add_argument("--size", type=count, default=224, metavar="PX", help="side of a crop (default %(default)s)")
    one.add_argument("--views", type=count, default=1, metavar="K", help="crops per decoded image (default 1)")
    one.add_argument("--workers", type=int, default=1, metavar="N", help="loader processes (default 1)")
    one.add_argument(
        "--images",
        type=count,
        default=256,
        metavar="N",
        help="crops per round (default %(default)s; more with several workers)",
    )
    one.add_argument("--against", metavar="SHARDS", help="shards for the plain path: the same images, not re-encoded")
    configured(step, 7).add_argument("--batch", type=count, metavar="N", help="images (default: for about 1 s)")
    configured(scale, 3).add_argument(
        "--processes", type=count, metavar="N", help="at most (default: one per GPU, or per core)"
    )
    configured(cost, 3).add_argument("--gpus", type=count, default=1, metavar="N", help="that share the work")
    arguments, rest = parser.parse_known_args(sys.argv[2:])
    if rest and (any(text.startswith("-") for text in rest) or "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # settings behind an option
        arguments.overrides += rest
    return arguments
