"""Numbers and tables as text: for reports, cards, pages and the terminal."""

from collections.abc import Sequence

from maedistill.escaping import markdown
from maedistill.report.intervals import of_count

KNN_CAVEAT = (
    "kNN on frozen features is a trend, not a forecast: a masked autoencoder with 11 % kNN was reported to reach 81 % "
    "after fine-tuning."
)


def interval_text(correct: int, images: int) -> str:
    """Format Wilson's 95 % interval of a share: `79.87 to 82.52 %`."""
    interval = of_count(correct, images)
    return f"{100 * interval.low:.2f} to {100 * interval.high:.2f} %"


def percent(count: int, total: int) -> str:
    """Format a share: `81.23 % (4061 of 5000)`."""
    return f"{100 * count / total:.2f} % ({count} of {total})"


def score_text(correct: int, images: int) -> str:
    """Format a share with its interval: `81.23 % (4061 of 5000), 95 % interval 80.12 to 82.28 %`."""
    return f"{percent(correct, images)}, 95 % interval {interval_text(correct, images)}"


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the last parts of each path: as few as keep different ones apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    depth = 1
    while len({tuple(words[-depth:]) for words in parts}) < len({tuple(words) for words in parts}):
        depth += 1
    return ["/".join(words[-depth:]) for words in parts]


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format the lines of a Markdown table; its cells hold text, no markup."""
    return [f"| {' | '.join(map(markdown, cells))} |" for cells in (heads, ["---"] * len(heads), *rows)]


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format the lines of a table for a terminal."""
    columns = zip(heads, *rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    lines = (zip(cells, widths, strict=True) for cells in (heads, *rows))
    return ["  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in lines]
