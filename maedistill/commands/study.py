"""Run a whole study (teachers, students, fine-tuning, seeds), and compare its networks."""

import argparse
import json
import shlex
import sys
from contextlib import suppress
from pathlib import Path

from maedistill.commands.arguments import at_least, new_parser, path
from maedistill.durable import require_local
from maedistill.errors import ConfigError
from maedistill.escaping import masked, say
from maedistill.study.file import load_study
from maedistill.study.schema import Study

EXAMPLES = """\
examples:
  maedistill study cifar10/study_methods
  maedistill study cifar10/study_methods data.train='shards/cifar10/train-*.tar' threads=1 --jobs 2
  maedistill study cifar10/study_methods --seeds 0 --only mae dmae --dry-run
  maedistill study cifar10/study_methods --test 'shards/cifar10/test-*.tar'
  maedistill study cifar10/study_methods --report

The same command again skips what is done and continues the rest; results of other settings are never overwritten.
OUT/results.md and results.json compare what is there. docs/studies.md says how a study is written.
key=value applies to every run that has the key. Exit codes: 0 done, 2 usage, 3 data, otherwise that of the first step
that failed.
"""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser("maedistill study", __doc__, EXAMPLES)
    add = parser.add_argument
    add("study", help="a study file, or the name of one that comes with maedistill, e.g. cifar10/study_methods")
    add("settings", nargs="*", metavar="key=value", help="for every run that has the key, e.g. data.workers=1")
    add("--out", type=path, help="folder of the runs and results, instead of the file's")
    add("--seeds", action="extend", nargs="+", metavar="N", help="instead of the file's: 0 1 2, or 0,1,2")
    add("--only", action="extend", nargs="+", metavar="NAME", help="only these students, rows or teachers")
    add("--jobs", type=at_least(1), default=1, metavar="N", help="runs at a time (default 1), spread over the GPUs")
    add("--test", metavar="SHARDS", help="also evaluate each fine-tuned network on these labelled shards")
    add("--dry-run", action="store_true", help="check everything, say which steps are done, and stop")
    add("--report", action="store_true", help="only compare what is there")
    arguments = parser.parse_intermixed_args(sys.argv[2:])
    # An option with several values takes every word up to the next option: settings among them stay settings.
    for option in ("seeds", "only"):
        words = getattr(arguments, option)
        if words is not None:
            arguments.settings += [word for word in words if "=" in word]
            setattr(arguments, option, [word for word in words if "=" not in word])
            if not getattr(arguments, option):
                parser.error(f"argument --{option}: expected at least one value before {words[0]}")
    if arguments.report and (arguments.only or arguments.jobs > 1 or arguments.test or arguments.dry_run):
        parser.error("--report only compares what is there: leave out --only, --jobs, --test and --dry-run")
    try:
        arguments.seeds = [int(number) for word in arguments.seeds or () for number in word.split(",")]
    except ValueError:
        parser.error(f"argument --seeds: {' '.join(arguments.seeds)}: expected whole numbers, e.g. 0 1 2")
    return arguments


def main() -> None:
    """Check everything before the first step starts. The comparison is written even if some steps fail."""
    arguments = parse()
    if any(seed < 0 for seed in arguments.seeds):
        raise ConfigError(f"--seeds {arguments.seeds}: seeds cannot be negative", "use 0 or more")
    study = load_study(arguments.study)
    out, seeds = arguments.out or path(study.out), arguments.seeds or list(study.seeds)
    require_local(out, "--out" if arguments.out else "out")
    if not arguments.report:
        run(study, out, seeds, arguments)
    if not arguments.dry_run and not report(study, out, seeds, arguments):
        raise ConfigError(
            f"{out} holds no finished run of this study", "start the study without --report, or name its folder: --out"
        )


def run(study: Study, out: Path, seeds: list[int], arguments: argparse.Namespace) -> None:
    """Run the steps, or print them. If some fail, the others are compared before the error is raised."""
    from maedistill.runs.terminal import outlive_readers
    from maedistill.study.plan import StudyPlan, add_tests
    from maedistill.study.runner import StepsFailed, print_steps, run_steps

    steps = StudyPlan(study, out, seeds, arguments.only, arguments.settings).steps()
    if arguments.test:
        steps = add_tests(steps, out, arguments.test)
    if arguments.dry_run:
        print_steps(steps)
        return
    outlive_readers()
    try:
        run_steps(steps, out=out, jobs=arguments.jobs)
    except StepsFailed:
        report(study, out, seeds, arguments)
        raise


def report(study: Study, out: Path, seeds: list[int], arguments: argparse.Namespace) -> bool:
    """Compare the finished runs. Returns whether there are any; otherwise nothing is written."""
    from maedistill.report.run_page import refresh
    from maedistill.study import study_page
    from maedistill.study.results import collect
    from maedistill.study.results_page import terminal_table, write_results

    command = masked(shlex.join(sys.argv))
    if arguments.report:
        with suppress(OSError, ValueError, LookupError, TypeError):  # damaged: it is written anew
            command = str(json.loads((out / "results.json").read_text())["command"])  # which started the runs
    results = collect(study, out, seeds)
    if not any(facts for network in results["networks"].values() for facts in network["runs"].values()):
        return False
    page = write_results(results, out, title=f"Results of {arguments.study}", command=command)
    say("", *terminal_table(results), "", f"results: {page}")
    refresh(out / study_page.PAGE, lambda: study_page.write_study_page(out, out / study_page.PAGE))
    return True
