"""Charts that compare networks: top-1 per row with its standard deviation and n; size, accuracy and latency.

Both functions return None if matplotlib is not installed. report/run_report.py draws the curves over epochs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

_LABEL_GAP = 0.085  # minimum distance of two labels, as a fraction of the axes' height


def accuracy_chart(accuracies: Mapping[str, Sequence[float]], path: Path) -> Path | None:
    """Draw one line per row: each seed's top-1 (in [0, 1]), their mean and, for 2+ seeds, their standard deviation."""
    canvas = _canvas(figsize=(6.4, 0.9 + 0.42 * len(accuracies)), layout="constrained")
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
    """Plot top-1 over latency, one disc per network. Its area grows with the parameters. Labels are beside the plot.

    rows: top1 and images (counts), latency_ms and parameters of each network, by name.
    """
    canvas = _canvas(figsize=(7.6, 4.2))
    if canvas is None or not rows:
        return None
    axes = canvas.figure.add_axes((0.09, 0.13, 0.5, 0.82))
    x = [row["latency_ms"] for row in rows.values()]
    y = [100 * row["top1"] / row["images"] for row in rows.values()]
    sizes = [row["parameters"] / 1e6 for row in rows.values()]
    colors = [f"C{i % 10}" for i in range(len(rows))]
    axes.scatter(x, y, s=[60 + 540 * size / max(sizes) for size in sizes], c=colors, alpha=0.6, zorder=3)
    margin = max(1.0, 0.12 * (max(y) - min(y)))
    low, high = min(y) - margin, max(y) + margin
    axes.set(xlabel="latency of one image, ms", ylabel="top-1, %", xlim=(0, 1.15 * max(x)), ylim=(low, high))
    axes.grid(alpha=0.3)
    heights = spread_apart([(value - low) / (high - low) for value in y], gap=_LABEL_GAP)
    for i, (name, height) in enumerate(zip(rows, heights, strict=True)):
        axes.annotate(
            f"{name}: {y[i]:.1f} %, {sizes[i]:.2f} M",
            xy=(x[i], y[i]),
            xytext=(1.06, height),
            textcoords="axes fraction",
            va="center",
            color=colors[i],
            arrowprops={"arrowstyle": "-", "color": colors[i], "alpha": 0.5, "linewidth": 0.8, "relpos": (0.0, 0.5)},
        )
    canvas.print_png(path)
    return path


def spread_apart(values: Sequence[float], *, gap: float) -> list[float]:
    """Return positions in [0, 1] near the values, in the same order, at least `gap` apart if there is enough room."""
    gap = min(gap, 1 / max(1, len(values) - 1))
    order = sorted(range(len(values)), key=lambda i: values[i])
    places = [0.0] * len(values)
    lowest = 0.0
    for i in order:  # upwards: each at least `gap` above the previous one
        places[i] = max(values[i], lowest)
        lowest = places[i] + gap
    highest = 1.0
    for i in reversed(order):  # downwards: move labels above the top back into the axes
        places[i] = min(places[i], highest)
        highest = places[i] - gap
    return places


def _canvas(**keywords: Any) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return FigureCanvasAgg(Figure(**keywords))
