"""Pre-trains a student: MAE, or distilled from a teacher by DMAE or AMD. `tools/pretrain.py --help` shows how."""

import argparse
import os
import sys

from maedistill.config.batch import batch_plan, world_size_from_environment
from maedistill.config.explain import explain
from maedistill.config.loader import load_config
from maedistill.config.render import render_config
from maedistill.errors import ConfigError, exit_code_of

USAGE = """\
examples:
  python tools/pretrain.py configs/imagenet/amd_vit_s.yaml data.train='in1k/train-{0000..1023}.tar' run=runs/amd_s
  torchrun --nproc-per-node 8 tools/pretrain.py configs/imagenet/dmae_vit_b.yaml data.train=... run=runs/dmae_b
  deepspeed --num_gpus 8 tools/pretrain.py CONFIG engine.zero=1
  srun --ntasks-per-node 8 python tools/pretrain.py CONFIG

Starting the same command again continues the run. Exit codes: 0 done, 2 usage, 3 data, 4 numerics, 5 a peer or the
hardware; RUN/exit.json says the same, since torchrun hides codes.
"""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split(".")[0], epilog=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="a YAML file, e.g. one of configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings on top of it, e.g. optim.epochs=200"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would happen, at what speed and cost, and stop"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print every setting and where it came from, and stop"
    )
    parser.add_argument(
        "--explain", metavar="KEY", help="say what a key means, its range and the papers' values, and stop"
    )
    parser.add_argument("--fresh", action="store_true", help="refuse a run folder that already holds a run")
    parser.add_argument("--extend", action="store_true", help="continue a run folder with another number of epochs")
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # deepspeed's launcher adds it; LOCAL_RANK rules
    return parser.parse_intermixed_args()


def main() -> None:
    """Checks the settings before torch is imported: a typo costs a tenth of a second."""
    arguments = parse()
    if arguments.explain:
        print(explain(arguments.explain))
        return
    if not arguments.config:
        raise ConfigError("no config is named", "name one of configs/, e.g. configs/quickstart/dmae.yaml; see --help")
    loaded = load_config(arguments.config, arguments.overrides, to_run=not arguments.print_config)
    if arguments.print_config:
        print(render_config(loaded), end="")
        return
    config = loaded.config
    world_size = world_size_from_environment()
    batch_plan(
        config.optim.global_batch, config.engine.micro_batch, world_size=world_size, views=config.data.views_per_image
    )
    if arguments.dry_run:
        from maedistill.plan import dry_run

        dry_run(config)
        return
    # On a CPU, torch's threads spin while they wait for each other: next to other busy processes that cost up to nine
    # tenths of the speed (measured on two cores), on a quiet machine sleeping costs nothing. Read when torch starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from maedistill.pretrain import pretrain

    pretrain(config, fresh=arguments.fresh, extend=arguments.extend)


if __name__ == "__main__":
    code = exit_code_of(main)
    if code == 0:
        # Leave without the interpreter's teardown: on its way through it a finished rank was seen to abort ("terminate
        # called without an active exception", threads of the process group), which a launcher takes for a failed run.
        sys.stdout.flush()
        os._exit(0)
    sys.exit(code)
