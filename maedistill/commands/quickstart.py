"""Run all steps on two CPU cores, with real digits: shards, teacher, students, fine-tuning, export, comparison.

    maedistill quickstart               everything, some minutes; started again, it skips what is done
    maedistill quickstart --epochs 2    a quick look

Every step is a command that works alone; OUT/logs has one log per step, which begins with its command. The trainings
are the study of quickstart/study; two run at a time.
"""

import sys
from pathlib import Path

from maedistill.commands.arguments import new_parser, path
from maedistill.durable import require_local
from maedistill.errors import ConfigError


def main() -> None:
    """Read the command line, and run the quickstart."""
    parser = new_parser("maedistill quickstart", __doc__)
    parser.add_argument("--epochs", type=float, help="epochs of every training, at least 2, instead of the configs'")
    parser.add_argument("--out", type=path, default=Path("runs/quickstart"), help="folder of the runs and the report")
    arguments = parser.parse_args(sys.argv[2:])
    if arguments.epochs is not None and arguments.epochs < 2:
        raise ConfigError(
            f"--epochs is {arguments.epochs:g}: one epoch of fine-tuning has 31 images, less than a batch of 32",
            "use 2 or more",
        )
    require_local(arguments.out, "--out")
    from maedistill.runs.terminal import outlive_readers
    from maedistill.study.quickstart import run_quickstart  # imports torch, for which --help need not wait

    outlive_readers()
    run_quickstart(arguments.out, epochs=arguments.epochs)
