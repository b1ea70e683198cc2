"""Curves over training: losses, accuracies with their 95 % intervals, learning rate, gradient norm and throughput.

metrics.jsonl of one or several runs -> one panel per quantity that any of them records -> PNG
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maedistill.report.charts import network_colors, new_canvas, plain, save
from maedistill.report.intervals import of_count

_Records = Sequence[Mapping[str, Any]]
_Point = tuple[float, float, float]  # x, value, images that an accuracy was measured on or 0
_COLUMNS = 4
_START = 0.1  # of a run; losses of this part do not stretch the axis


@dataclass(frozen=True)
class Panel:
    """One quantity that runs record. name: of the metric; with a slash at its end, the mean of all that begin so."""

    name: str
    title: str
    unit: str
    kind: Literal["loss", "accuracy", "other"] = "loss"
    scale: Literal["linear", "log"] = "linear"


_PANELS = (
    Panel("loss", "training loss, all terms", "loss"),
    Panel("pixels", "pixel loss", "mean squared error"),
    Panel("align/", "direct alignment", "loss"),
    Panel("generate/", "generated alignment", "loss"),
    Panel("cross_entropy", "training cross-entropy", "nats"),
    Panel("val_loss", "validation cross-entropy", "nats"),
    Panel("top1", "validation top-1", "%", "accuracy"),
    Panel("ema_top1", "top-1, moving average", "%", "accuracy"),
    Panel("knn", "kNN top-1", "%", "accuracy"),
    Panel("linear", "linear probe top-1", "%", "accuracy"),
    Panel("lr", "learning rate", "AdamW", "other"),
    Panel("grad_norm", "gradient norm", "L2", "other", "log"),
    Panel("images_per_second", "throughput", "images/s per rank", "other"),
)
_NO_TERM = {"step", "epoch", "data_wait", "memory_gb", "nonfinite", "eta_seconds", "trained_seconds", "target_std"}
_NO_TERM |= {"weight/", *(panel.name for panel in _PANELS)}


def find_panels(runs: Iterable[_Records]) -> list[Panel]:
    """Return what any of the runs records: its usual quantities, and after the losses each other term of a loss.

    A term of several parts is their mean, but those of a peer are terms by themselves. Scheduled weights are left out.
    """
    names, of_steps = dict[str, None](), dict[str, None]()
    for record in (record for records in runs for record in records):
        names |= dict.fromkeys(record)
        of_steps |= dict.fromkeys(record if "loss" in record else ())
    terms = [term for term in dict.fromkeys(map(_term, of_steps)) if term not in _NO_TERM]
    place = 1 + [panel.name for panel in _PANELS].index("cross_entropy")
    panels = [*_PANELS[:place], *(Panel(term, term.rstrip("/"), "loss") for term in terms), *_PANELS[place:]]
    return [panel for panel in panels if panel.name in {*names, *map(_term, names)}]


def _term(name: str) -> str:
    """Return the term that a part belongs to: `hints/` of `hints/3`."""
    return name if re.match(r"peer\d+/", name) else "".join(name.partition("/")[:2])


def draw_curves(
    records: Mapping[str, _Records],
    path: Path,
    *,
    over: Literal["epoch", "minutes"] = "epoch",
    order: Sequence[str] = (),
    restarts: Sequence[int] = (),
) -> Path | None:
    """Draw one line per run in every panel. Returns None if matplotlib is not installed.

    over: epochs, or minutes of training. A single run shows both. order: all names of the study, which determine the
    colors. restarts: steps at which a single run was continued, marked by vertical lines.
    """
    panels = find_panels(records.values())
    lines = {panel: {name: _points(run, panel, over) for name, run in records.items()} for panel in panels}
    lines = {panel: runs for panel, runs in lines.items() if any(runs.values())}
    columns = min(_COLUMNS, len(lines))
    rows = -(-len(lines) // _COLUMNS)
    canvas = new_canvas(figsize=(3.5 * columns, 2.9 * rows + 0.4))
    if canvas is None:
        return None
    colors, figure = network_colors(order or list(records)), canvas.figure
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (panel, runs) in zip(grid, lines.items(), strict=False):
        _draw(axes, panel, runs, colors)
        axes.set_xlabel("epoch" if over == "epoch" else "minutes of training")
        if len(records) == 1 and over == "epoch":
            _add_minutes(axes, next(iter(records.values())), restarts)
    for axes in grid[len(lines) :]:
        axes.set_visible(False)
    if len(records) > 1:
        handles = [grid[0].plot([], [], color=colors[name], label=plain(name))[0] for name in records]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(8, len(handles)))
    return save(canvas, path)


def mean_metric(record: Mapping[str, Any], name: str) -> float | None:
    """Return a record's metric; if the name ends with a slash, the mean of all that begin so. None if it has none."""
    if not name.endswith("/"):
        return record.get(name)
    values = [value for key, value in record.items() if key.startswith(name) and value is not None]
    return sum(values) / len(values) if values else None


def _points(records: _Records, panel: Panel, over: str) -> list[_Point]:
    """Return the points of a line. An evaluation has the minutes of the last training step before it."""
    points, minutes = list[_Point](), 0.0
    for record in records:
        minutes = record.get("trained_seconds", 60 * minutes) / 60
        if (value := mean_metric(record, panel.name)) is not None:
            points.append((record["epoch"] if over == "epoch" else minutes, value, images_of(record, panel.name)))
    return points


def images_of(record: Mapping[str, Any], name: str) -> int:
    """Return the images that an accuracy was measured on, 0 if the record does not say."""
    return record.get(f"{name.removesuffix('top1')}images", record.get("images", 0))


def _draw(axes: Any, panel: Panel, runs: Mapping[str, Sequence[_Point]], colors: Mapping[str, Any]) -> None:
    """Draw one panel."""
    for name, points in runs.items():
        if points and panel.kind == "accuracy":
            x, y, bars = _with_bars(points)
            axes.errorbar(x, y, yerr=bars, color=colors[name], marker="o", markersize=3, capsize=2)
        elif points:
            x, y, _ = np.array(points).T
            axes.plot(x, y, color=colors[name], marker="o" if len(points) < 3 else None, markersize=3)
    axes.set_yscale(panel.scale)
    clipped = panel.kind == "loss" and _clip_start(axes, [points for points in runs.values() if points])
    axes.set_title(panel.title + (" (start cut off)" if clipped else ""), fontsize="medium")
    axes.set_ylabel(panel.unit)
    axes.grid(alpha=0.3)


def _with_bars(points: Sequence[_Point]) -> tuple[list[float], list[float], list[list[float]]]:
    """Return x, the accuracy in percent, and the lengths of its 95 % bars, 0 where the number of images is unknown."""
    below, above = [], []
    for _, share, images in points:
        interval = of_count(round(share * images), int(images)) if images else None
        below.append(100 * (share - interval.low) if interval else 0.0)
        above.append(100 * (interval.high - share) if interval else 0.0)
    return [x for x, _, _ in points], [100 * share for _, share, _ in points], [below, above]


def _clip_start(axes: Any, runs: Sequence[Sequence[_Point]]) -> bool:
    """End the axis above the losses after the start, if those of the start would take most of it."""
    if limits := clipped_range([[(x, y) for x, y, _ in points] for points in runs]):
        axes.set_ylim(*limits)
    return limits is not None


def clipped_range(runs: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float] | None:
    """Return the ends of an axis for losses after the start, if those of the start would take most of it."""
    every = [y for points in runs for _, y in points]
    rest = [y for points in runs for x, y in points if x > _START * max(point[0] for point in points)]
    if len(rest) < 3 or not (span := max(rest) - min(every)) or max(every) - max(rest) < 0.5 * span:
        return None
    return min(every) - 0.05 * span, max(rest) + 0.1 * span


def _add_minutes(axes: Any, records: _Records, restarts: Sequence[int]) -> None:
    """Add a second axis with minutes of training, and a mark where the run was continued."""
    steps = [record for record in records if "trained_seconds" in record]
    if not steps:
        return
    epochs = [0.0, *(record["epoch"] for record in steps)]
    minutes = [0.0, *(record["trained_seconds"] / 60 for record in steps)]
    if len(set(epochs)) == len(epochs) and len(set(minutes)) == len(minutes):
        per_epoch, per_minute = minutes[-1] / epochs[-1], epochs[-1] / minutes[-1]

        def to_minutes(x: Any) -> Any:
            return np.where(x <= epochs[-1], np.interp(x, epochs, minutes), x * per_epoch)

        def to_epochs(x: Any) -> Any:
            return np.where(x <= minutes[-1], np.interp(x, minutes, epochs), x * per_minute)

        second = axes.secondary_xaxis("top", functions=(to_minutes, to_epochs))
        second.set_xlabel("minutes", fontsize="small")
        second.tick_params(labelsize="small")
    last = steps[-1]
    for step in restarts:
        axes.axvline(step * last["epoch"] / last["step"], color="gray", linestyle=":", linewidth=1)
