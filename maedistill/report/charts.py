"""Charts of networks: top-1 per row of a study, top-1 over the length of training; size, accuracy and latency.

Bars are 95 % intervals. A network has one color in all pictures of a study: its place in `order`, all names of the
study. Where networks are joined, a line has one. All functions return None if matplotlib is not installed, or if the
disk refuses the picture. Curves through one training are in `curves.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from maedistill.escaping import shown
from maedistill.report.intervals import Interval
from maedistill.runs.records import ignore_write_errors

_WIDTH = 0.02  # of the axis, between networks that share a point
_LONGEST = 100  # characters of a name that are shown
_LARGEST = 900  # points², the area of the largest disc


@dataclass(frozen=True)
class Accuracy:
    """The top-1 of a network's runs, as fractions, and the interval of one run or of their mean."""

    each: Sequence[float]
    interval: Interval


@dataclass(frozen=True)
class Trained:
    """A network's accuracy, and what training it took: epochs and minutes of both stages, means over seeds."""

    accuracy: Accuracy
    epochs: float
    minutes: float


@dataclass(frozen=True)
class Timed:
    """A network's accuracy, its size and the latency of one image, which networks of one architecture share.

    joined: the network of which this is one file of several. panel: how it was measured, others do not compare.
    """

    accuracy: Interval
    megabytes: float
    latency_ms: float
    joined: str | None = None
    panel: tuple[str, ...] = ()


def accuracy_chart(rows: Mapping[str, Accuracy], path: Path, *, order: Sequence[str]) -> Path | None:
    """Draw one line per row: the mean top-1 with its interval, and the top-1 of each run."""
    canvas = new_canvas(figsize=(7.2, 1.1 + 0.42 * len(rows)))
    if canvas is None or not rows:
        return None
    axes, colors = canvas.figure.add_subplot(), network_colors(order)
    for row, (name, one) in enumerate(rows.items()):
        axes.errorbar(100 * one.interval.value, row, xerr=_bars(one.interval), fmt="o", color=colors[name], capsize=4)
        if len(one.each) > 1:
            percents = [100 * value for value in one.each]
            axes.scatter(percents, [row] * len(percents), s=14, color="white", edgecolor="black", zorder=3)
    axes.set_yticks(range(len(rows)), [plain(f"{name} (n = {len(one.each)})") for name, one in rows.items()])
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    canvas.figure.supxlabel(f"top-1, %, {_interval_text([*rows.values()])}", fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
    return save(canvas, path)


def length_chart(lines: Mapping[str, Sequence[Trained]], path: Path) -> Path | None:
    """Plot top-1 over epochs and over minutes of training, networks of a line joined; wide ranges are logarithmic."""
    drawn = [network for networks in lines.values() for network in networks]
    widest = max((len(name[-_LONGEST:]) for name in lines), default=0)
    canvas = new_canvas(figsize=(10.4 + 0.08 * widest, min(max(4.2, 0.25 * len(lines)), 60)))
    if canvas is None or not drawn:
        return None
    from matplotlib.ticker import LogLocator

    panels, colors = canvas.figure.subplots(1, 2, sharey=True), network_colors(list(lines))
    for axes, unit in zip(panels, ("epochs", "minutes"), strict=True):
        for name, networks in lines.items():
            points = sorted(networks, key=lambda network: getattr(network, unit))
            x = [getattr(network, unit) for network in points]
            y = [100 * network.accuracy.interval.value for network in points]
            bars = [[one for end in _bars(network.accuracy.interval) for one in end] for network in points]
            ends = [*zip(*bars, strict=True)] or None
            axes.errorbar(x, y, yerr=ends, fmt="o-", color=colors[name], capsize=3, label=plain(name[-_LONGEST:]))
            for place, network in zip(x, points, strict=True):
                each = [100 * value for value in network.accuracy.each]
                if len(each) > 1:
                    axes.scatter([place] * len(each), each, s=12, color="white", edgecolor=colors[name], zorder=3)
        span = [getattr(network, unit) for network in drawn]
        if is_wide := max(span) > 2 * min(span):
            axes.set_xscale("log", subs=[])  # no minor ticks
            axes.xaxis.set_major_locator(LogLocator(subs=range(1, 10) if max(span) < 5 * min(span) else (1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"{unit} of training, both stages" + ", logarithmic" * is_wide)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1, %")
    about = f"without the training of teachers; {_interval_text([network.accuracy for network in drawn])}"
    canvas.figure.supxlabel(about, fontsize="medium")
    canvas.figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return save(canvas, path)


def latency_chart(rows: Mapping[str, Timed], path: Path, *, order: Sequence[str]) -> Path | None:
    """Plot top-1 over latency, one disc per network, whose area is proportional to its size.

    Networks with the same latency stand side by side, in the order of their accuracy. A line joins the files of one
    network. What was not measured alike is in another panel, with another scale of areas.
    """
    panels = list(dict.fromkeys(row.panel for row in rows.values()))
    widest = max((len(name[-_LONGEST:]) for name in rows), default=0)  # name in the legend
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / max(1, columns))
    height = min(max(4.2 * lines, 0.25 * len(rows)), 60)  # inches: matplotlib draws 650 at most
    canvas = new_canvas(figsize=(4.2 * columns + max(4.2, 3 + 0.08 * widest), height))
    if canvas is None or not rows:
        return None
    colors, discs, first = network_colors(order), [], None
    for number, panel in enumerate(panels, 1):
        axes = first = canvas.figure.add_subplot(lines, columns, number, sharey=first)
        axes.set_title("\n".join(plain(text[-_LONGEST:]) for text in panel), fontsize="small")
        inside = {name: row for name, row in rows.items() if row.panel == panel}
        discs += _draw_panel(axes, inside, colors, scale=_LARGEST / max(row.megabytes for row in inside.values()))
    legend = canvas.figure.legend(handles=discs, loc="outside right upper", title="top-1 (95 % interval), size")
    for disc in legend.legend_handles:
        disc.set_sizes([60])
    return save(canvas, path)


def _draw_panel(axes: Any, rows: Mapping[str, Timed], colors: Mapping[str, Any], *, scale: float) -> list[Any]:
    """Draw the discs of networks that were measured alike, and return them. scale: area of a disc for each MB."""
    places = side_by_side({name: (row.latency_ms, row.accuracy.value) for name, row in rows.items()})
    discs = []
    for name, row in rows.items():
        one, color = row.accuracy, colors[name]
        share = f"{100 * one.value:.1f} % ({100 * one.low:.1f} to {100 * one.high:.1f})"
        axes.errorbar(places[name], 100 * one.value, yerr=_bars(one), color=color, capsize=3, zorder=2)
        disc = axes.scatter(places[name], 100 * one.value, s=scale * row.megabytes, color=color, linewidth=0, alpha=0.8)
        disc.set(label=plain(f"{name[-_LONGEST:]}: {share}, {row.megabytes:.3g} MB"), zorder=3, clip_on=False)
        discs.append(disc)
    for network in {row.joined for row in rows.values()} - {None}:
        points = sorted((places[name], 100 * row.accuracy.value) for name, row in rows.items() if row.joined == network)
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), color="gray", linewidth=1, zorder=1)
    axes.set_xlim(0, 1.1 * max(places.values()))
    shared = len({row.latency_ms for row in rows.values()}) < len(rows)
    note = "\n(networks of equal latency stand side by side)" if shared else ""
    axes.set(xlabel=f"latency of one image, ms{note}", ylabel="top-1, %, with 95 % interval")
    axes.margins(y=0.15)  # for the discs
    axes.grid(alpha=0.3)
    return discs


def plain(text: str) -> str:
    """Return the text for matplotlib, which reads `$` as a formula and hides legend entries that begin with `_`."""
    text = shown(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def network_colors(names: Sequence[str]) -> dict[str, Any]:
    """Return a color for each name, which depends on its place only."""
    from matplotlib import colormaps

    if len(names) <= 10:
        return {name: colormaps["tab10"](place) for place, name in enumerate(names)}
    return {name: colormaps["turbo"](place / (len(names) - 1)) for place, name in enumerate(names)}


def new_canvas(*, figsize: tuple[float, float]) -> Any:
    """Return an empty canvas with a white background, or None if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return FigureCanvasAgg(Figure(figsize=figsize, layout="constrained", facecolor="white"))


def save(canvas: Any, path: Path) -> Path | None:
    """Write a canvas as PNG and return its path; None, with a warning, if the disk refuses it."""
    with ignore_write_errors(path):
        canvas.print_png(path)
        return path
    return None


def _interval_text(accuracies: Sequence[Accuracy]) -> str:
    """Say what the bars and the white dots of a chart are."""
    kinds = {one.interval.kind for one in accuracies}
    sources = ["n = 1: of the images"] * ("images" in kinds) + ["n > 1: t, over seeds"] * ("seeds" in kinds)
    return f"with 95 % interval ({'; '.join(sources)})" + ("; white: each seed" if "seeds" in kinds else "")


def _bars(interval: Interval) -> list[list[float]]:
    """Return the lengths of an error bar in percent, as matplotlib wants them."""
    return [[100 * (interval.value - interval.low)], [100 * (interval.high - interval.value)]]


def side_by_side(points: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return an x for each name: its own, or spread around it if several have the same."""
    widest = max(x for x, _ in points.values())
    places = {}
    for x, group in groupby(sorted(points, key=points.__getitem__), key=lambda name: points[name][0]):
        names = list(group)
        for i, name in enumerate(names):
            places[name] = x + _WIDTH * widest * (i - (len(names) - 1) / 2)
    return places
