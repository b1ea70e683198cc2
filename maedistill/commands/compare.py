"""Compare runs and exports by size, accuracy and latency: one table, one picture."""

import argparse
import shlex
import sys
from pathlib import Path

from maedistill.commands.arguments import new_parser, path
from maedistill.durable import require_local
from maedistill.escaping import masked, say

EXAMPLES = """\
examples:
  maedistill compare runs/dmae_s_finetuned                the formats and exits that export --val scored
  maedistill compare runs/dmae_s_finetuned runs/mae_s_finetuned/export vit_small.json --out comparison

It reads scorecards: RUN/export*/scorecard_FORMAT.json of maedistill export RUN --val SHARDS, RUN/scorecard.json, and
the files of maedistill evaluate --json, also of its exits. OUT gets comparison.md, comparison.json and comparison.png.
Exit codes: 0 done, 2 usage, 3 no scorecard or a damaged one.
"""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser("maedistill compare", __doc__, EXAMPLES)
    add = parser.add_argument
    add("given", nargs="+", metavar="RUN_OR_EXPORT", help="a run with its exports, an export, or a scorecard")
    add("--out", type=path, default=Path("runs/comparison"), help="folder to write (default runs/comparison)")
    return parser.parse_args(sys.argv[2:])


def main() -> None:
    """Read the scorecards, print the table and write the page."""
    arguments = parse_arguments()
    require_local(arguments.out, "--out")
    from maedistill.exporting.scorecards import HEADS, notes, read_rows, write_page  # imports torch
    from maedistill.report.formatting import text_table

    rows = read_rows(arguments.given)
    page = write_page(rows, arguments.out, command=masked(shlex.join(sys.argv)))
    say(*text_table(HEADS[:5], [row.cells()[:5] for row in rows]), "", *notes(rows)[:-1])
    say(f"comparison: {page}")
