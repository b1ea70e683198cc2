"""The command line of a training stage, `maedistill pretrain` and `finetune`: CONFIG, key=value, few flags.

Settings are checked before torch is imported, which takes seconds, so a typo is reported at once.
"""

import argparse
import os
import sys
from collections.abc import Callable

from maedistill.commands.arguments import new_parser
from maedistill.config.loader import load_config
from maedistill.config.plan import is_first_rank, share_batch, world_size_from_environment
from maedistill.config.render import explain, render_config
from maedistill.config.schema import AUTO
from maedistill.config.values import Root
from maedistill.errors import ConfigError
from maedistill.escaping import say, shown
from maedistill.processes.parent_death import die_with_launcher
from maedistill.runs.terminal import outlive_readers

EXIT_CODES = """
Starting the same command again continues the run. Exit codes: 0 done, 2 usage, 3 data, 4 numerics, 5 a peer or the
hardware, 75 stopped by SIGTERM or SIGUSR1, 130 Ctrl-C; RUN/exit.json says the same, since torchrun hides codes.
"""


def run_command(
    root: type[Root], *, about: str, examples: str, start: Callable[..., None], dry_run: Callable[..., None]
) -> None:
    """Parse the command line and run the command.

    start: called as start(config, fresh=..., extend=...); dry_run: as dry_run(config, extend=...). Both import heavy
    packages themselves.
    """
    die_with_launcher()
    arguments = _parse(root, about, examples)
    _require_effect(arguments)
    if arguments.explain is not None:
        say(*explain(arguments.explain, root).split("\n"))
        return
    if not arguments.config:
        tool = f"maedistill {root.stage}"
        usage = f"usage: {tool} CONFIG [key=value ...]; `{tool} --help` has examples and the names of options"
        raise ConfigError("no config is named", usage)
    loaded = load_config(arguments.config, arguments.overrides, root=root, to_run=not arguments.print_config)
    if arguments.print_config:
        say(*render_config(loaded).splitlines())
        return
    if loaded.config.optim.global_batch != AUTO:  # which is chosen so that the ranks can share it
        share_batch(loaded.config, world_size_from_environment())
    # On a CPU, torch's threads spin while they wait for each other. Next to other busy processes, spinning cost up to
    # 90 % of the speed (measured on two cores); on an idle machine, sleeping costs nothing. torch reads it at start.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise a lost peer prints 15 lines of C++ frames
    if not arguments.dry_run:
        outlive_readers()
    if arguments.extend:
        from maedistill.runs.resolve_auto import with_warmup_of_run

        loaded = with_warmup_of_run(loaded)
    if loaded.notes and is_first_rank():
        say(*loaded.notes)
    if arguments.fresh:
        _confirm_deletion(loaded.config.run, asked=not arguments.yes)
    if arguments.dry_run:
        dry_run(loaded.config, extend=arguments.extend)
    else:
        start(loaded.config, fresh=arguments.fresh, extend=arguments.extend)


def _parse(root: type[Root], about: str, examples: str) -> argparse.Namespace:
    parser = new_parser(f"maedistill {root.stage}", about, examples + EXIT_CODES)
    add = parser.add_argument
    add(
        "config",
        nargs="?",
        help="a YAML file, or the name of a config of maedistill, e.g. imagenet/dmae_vit_b",
    )
    add("overrides", nargs="*", metavar="key=value", help="settings on top of it, e.g. optim.epochs=200")
    add("--dry-run", action="store_true", help="say what would happen, at what speed and cost, and stop")
    add("--print-config", action="store_true", help="print every setting and where it came from, and stop")
    text = "say what a key means, its range and the papers' values, and stop; without KEY, list the sections"
    add("--explain", nargs="?", const="", metavar="KEY", help=text)
    add("--fresh", action="store_true", help="delete the run in the folder and start over; asks on a terminal")
    add("--yes", action="store_true", help="with --fresh: delete without asking")
    add("--extend", action="store_true", help="continue a run folder with another number of epochs")
    return parser.parse_intermixed_args(sys.argv[2:])


def _require_effect(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for options that would have no effect together."""
    if arguments.yes and not arguments.fresh:
        raise ConfigError("--yes only answers the question of --fresh", "leave it out, or add --fresh")
    names = ("explain", "print_config", "fresh", "dry_run", "extend")
    given = [name for name in names if getattr(arguments, name) not in (None, False)]
    first, *others = [f"--{name.replace('_', '-')}" for name in given] or [""]
    if others and first in ("--explain", "--print-config"):
        raise ConfigError(f"{first} prints and stops: {others[0]} has no effect", f"leave out {first} or {others[0]}")
    if others and first == "--fresh":
        raise ConfigError(f"--fresh starts over, which {others[0]} does not", f"leave out --fresh or {others[0]}")
    if first == "--explain" and arguments.config:
        words = " ".join([arguments.config, *arguments.overrides])
        raise ConfigError(f"--explain reads no config: {words} has no effect", "leave it out, or use --print-config")


def _confirm_deletion(run: str, *, asked: bool) -> None:
    """Ask whether to delete the run in the folder `run`, if there is one. Raises ConfigError unless the answer is yes.

    With several ranks nobody is asked: a launcher gives its ranks no terminal.
    """
    if not asked or not os.path.exists(os.path.join(os.path.expanduser(run), "run.json")):
        return
    if world_size_from_environment() > 1 or not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            f"run: --fresh would delete the run in {run}, and there is no terminal to ask on",
            "add --yes to delete it without being asked, leave out --fresh to continue it, or use another run=",
        )
    from maedistill.runs.folder import RunFolder

    question = f"{RunFolder(run).describe_checkpoints()}: delete and start over? [y/N] "
    sys.stdout.write(shown(question))
    sys.stdout.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):  # empty at the end of input
        raise ConfigError(f"run: {run} stays as it is", "leave out --fresh to continue it, or use another run=")
