"""Make a page of a run, of a study, or of several runs side by side: one HTML file that loads nothing else."""

import argparse
import os
import sys
from pathlib import Path

from maedistill.commands.arguments import new_parser, path
from maedistill.durable import why_not_local
from maedistill.errors import ConfigError
from maedistill.escaping import say

MOST = 24  # runs on a page
EXAMPLES = """\
examples:
  maedistill report runs/dmae_b
  maedistill report runs/quickstart
  maedistill report runs/mae_s runs/dmae_s --out comparison.html

It needs Bokeh: pip install 'maedistill[report]'. While a run trains, an existing page is updated after every
evaluation; log.report=true also makes the first one. docs/report.md shows one.
"""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser("maedistill report", __doc__, EXAMPLES)
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="run folders, or the folder of one study")
    parser.add_argument(
        "--out",
        type=path,
        metavar="FILE",
        help="the page (default: report.html in the run folder, results.html in a study's, comparison.html here)",
    )
    return parser.parse_args(sys.argv[2:])


def main() -> None:
    """Write the page."""
    arguments = parse_arguments()
    for given in (*arguments.runs, arguments.out or ""):
        if problem := why_not_local(given):
            raise ConfigError(*problem)
    if len(arguments.runs) > MOST:
        raise ConfigError(f"{len(arguments.runs)} runs are too many for one page", f"name at most {MOST}")
    from maedistill.report.run_page import PAGE, write_page  # numpy and Pillow, for which --help need not wait
    from maedistill.study import study_page

    paths: list[Path] = arguments.runs
    if len(paths) == 1 and os.path.isfile(paths[0] / "results.json"):
        page = study_page.write_study_page(paths[0], arguments.out or paths[0] / study_page.PAGE)
    else:
        page = write_page(paths, arguments.out or (paths[0] / PAGE if len(paths) == 1 else Path("comparison.html")))
    say(f"page: {page}")
