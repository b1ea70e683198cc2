"""Charts that compare networks: top-1 per row with its standard deviation and n; size, accuracy and latency.

Both functions return None if matplotlib is not installed. run_report.py draws the curves over epochs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any


def accuracy_chart(accuracies: Mapping[str, Sequence[float]], path: Path) -> Path | None:
    """Draw one line per row: each seed's top-1 (in [0, 1]), their mean and, for 2+ seeds, their standard deviation."""
    canvas = _canvas(figsize=(6.4, 0.9 + 0.42 * len(accuracies)))
    if canvas is None or not accuracies:
        return None
    axes = canvas.figure.add_subplot()
    for row, values in enumerate(accuracies.values()):
        percents = [100 * value for value in values]
        spread = stdev(percents) if len(percents) > 1 else None
        axes.errorbar(fmean(percents), row, xerr=spread, fmt="o", color="C0", capsize=4, zorder=2)
        axes.scatter(percents, [row] * len(percents), s=12, color="C1", alpha=0.8, zorder=3)
    axes.set_yticks(range(len(accuracies)), [f"{name} (n = {len(values)})" for name, values in accuracies.items()])
    axes.set_ylim(len(accuracies) - 0.4, -0.6)  # the first row on top
    canvas.figure.supxlabel("top-1, %: mean and standard deviation (blue), each seed (orange)", fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
    canvas.print_png(path)
    return path


def latency_chart(rows: Mapping[str, Mapping[str, Any]], path: Path) -> Path | None:
    """Plot top-1 over latency, one disc per network, whose area grows with the parameters.

    rows: top1 and images (counts), latency_ms and parameters of each network, by name.
    """
    canvas = _canvas(figsize=(7.6, 4.2))
    if canvas is None or not rows:
        return None
    axes = canvas.figure.add_subplot(xlabel="latency of one image, ms", ylabel="top-1, %")
    most = max(row["parameters"] for row in rows.values())
    for name, row in rows.items():
        accuracy, size = 100 * row["top1"] / row["images"], row["parameters"]
        label = f"{name}: {accuracy:.1f} %, {size / 1e6:.2f} M"
        axes.scatter(row["latency_ms"], accuracy, s=60 + 540 * size / most, alpha=0.6, label=label, zorder=3)
    axes.margins(0.15)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    for disc in canvas.figure.legend(loc="outside right upper").legend_handles:
        disc.set_sizes([60])
    canvas.print_png(path)
    return path


def _canvas(*, figsize: tuple[float, float]) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return FigureCanvasAgg(Figure(figsize=figsize, layout="constrained"))
