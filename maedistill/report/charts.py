"""Charts of networks: curves over epochs; top-1 per row with its standard deviation; size, accuracy and latency.

All functions return None if matplotlib is not installed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

_CURVES = {  # prefix of the metrics' names: title
    "pixels": "pixel loss",
    "align/": "direct alignment",
    "generate/": "generated alignment",
    "knn": "kNN",
    "linear": "linear probe",
    "cross_entropy": "cross-entropy",
    "accuracy": "top-1",
}


def draw_curves(records: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path | None:
    """Draw losses, alignment, probes and accuracy over epochs, one line per run."""
    panels = {prefix: {name: _series(run, prefix) for name, run in records.items()} for prefix in _CURVES}
    panels = {prefix: lines for prefix, lines in panels.items() if any(lines.values())}
    canvas = _canvas(figsize=(4 * len(panels), 3.2))
    if canvas is None:
        return None
    for axes, (prefix, lines) in zip(
        canvas.figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, points in lines.items():
            if points:
                few = prefix in ("knn", "linear", "accuracy") or len(points) < 3  # too few points for a visible line
                axes.plot(*zip(*points, strict=True), label=name, marker="o" if few else None, markersize=3)
        axes.set(xlabel="epoch", title=_CURVES[prefix])
        axes.grid(alpha=0.3)
        axes.legend()
    canvas.print_png(path)
    return path


def mean_metric(record: Mapping[str, Any], prefix: str) -> float | None:
    """Return the mean of a record's metrics whose names start with `prefix`; None if it has none."""
    values = [value for name, value in record.items() if name.startswith(prefix) and value is not None]
    return sum(values) / len(values) if values else None


def _series(records: Sequence[Mapping[str, Any]], prefix: str) -> list[tuple[float, float]]:
    """Return (epoch, mean of the metrics whose names start with `prefix`) of the records that have any."""
    points = []
    for record in records:
        accuracy = {"accuracy": record["top1"] / record["images"]} if "top1" in record else {}
        if (value := mean_metric({**record, **accuracy}, prefix)) is not None:
            points.append((record["epoch"], value))
    return points


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
