"""Curves over training: losses, accuracies with their 95 % intervals, learning rate, gradient norm and throughput.

metrics.jsonl of a run -> one panel per quantity that it records -> PNG; interactive.py draws several runs
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maedistill.report.charts import new_canvas, save
from maedistill.report.intervals import of_count
from maedistill.runs.history import RESERVED

_Records = Sequence[Mapping[str, Any]]
_Point = tuple[float, float, float, float]  # x, value, ends of its interval
_COLUMNS = 4
_COLOR = "tab:blue"
_START = 0.1  # of a run; losses of this part do not stretch the axis


@dataclass(frozen=True)
class Panel:
    """One quantity that runs record. name: of the metric; with a slash at its end, the mean of the term's parts."""

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
_NO_TERM = {*RESERVED, "weight/", *(panel.name for panel in _PANELS)}


def find_panels(runs: Iterable[_Records]) -> list[Panel]:
    """Return what any of the runs records: its usual quantities, and after the losses each other term of a loss.

    A term of several parts is their mean; those of a peer and of a further teacher are terms by themselves. Scheduled
    weights are left out, and so is the sum of all terms if it is the only one.
    """
    names, of_steps = dict[str, None](), dict[str, None]()
    all_records = [record for records in runs for record in records]
    for record in all_records:
        names |= dict.fromkeys(record)
        of_steps |= dict.fromkeys(record if "loss" in record else ())
    terms = [term for term in dict.fromkeys(map(_term, of_steps)) if term not in _NO_TERM]
    place = 1 + [panel.name for panel in _PANELS].index("cross_entropy")
    panels = [*_PANELS[:place], *(Panel(term, term.rstrip("/"), "loss") for term in terms), *_PANELS[place:]]
    found = [panel for panel in panels if panel.name in {*names, *map(_term, names)}]
    losses = [panel.name for panel in found if panel.kind == "loss" and panel.name not in ("loss", "val_loss")]
    if len(losses) == 1 and all(one["loss"] == mean_metric(one, losses[0]) for one in all_records if "loss" in one):
        found = [panel for panel in found if panel.name != "loss"]
    return found


def _term(name: str) -> str:
    """Return the term that a part belongs to: `hints/` of `hints/3`, `align/teacher2/` of `align/teacher2/8`."""
    found = re.match(r"peer\d+/.*|align/teacher\d+/|[^/]*/?", name)
    assert found is not None  # the last alternative matches any text
    return found[0]


def draw_curves(records: _Records, path: Path, *, restarts: Sequence[int] = ()) -> Path | None:
    """Draw every quantity that a run records, over epochs and minutes. Returns None if matplotlib is not installed.

    restarts: steps at which the run was continued, marked by vertical lines.
    """
    lines = {panel: _points(records, panel) for panel in find_panels([records])}
    lines = {panel: points for panel, points in lines.items() if points}
    columns = min(_COLUMNS, len(lines))
    rows = -(-len(lines) // _COLUMNS)
    canvas = new_canvas(figsize=(3.5 * columns, 2.9 * rows + 0.4))
    if canvas is None:
        return None
    grid = canvas.figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (panel, points) in zip(grid, lines.items(), strict=False):
        _draw(axes, panel, points)
        axes.set_xlabel("epoch")
        _add_minutes(axes, records, restarts)
    for axes in grid[len(lines) :]:
        axes.set_visible(False)
    return save(canvas, path)


def mean_metric(record: Mapping[str, Any], name: str) -> float | None:
    """Return a record's metric; if the name ends with a slash, the mean of this term's parts. None if it has none."""
    if not name.endswith("/"):
        return record.get(name)
    values = [value for key, value in record.items() if _term(key) == name and value is not None]
    return sum(values) / len(values) if values else None


def _points(records: _Records, panel: Panel) -> list[_Point]:
    """Return the points of a line."""
    values = ((record, mean_metric(record, panel.name)) for record in records)
    return [
        (record["epoch"], value, *interval_ends(record, panel, value)) for record, value in values if value is not None
    ]


def interval_ends(record: Mapping[str, Any], panel: Panel, value: float) -> tuple[float, float]:
    """Return the ends of the 95 % interval of an accuracy; the value itself if the record does not say of how many
    images it is, and for other quantities.
    """
    images = record.get(f"{panel.name.removesuffix('top1')}images", record.get("images", 0))
    if panel.kind != "accuracy" or not images:
        return value, value
    interval = of_count(round(value * images), int(images))
    return interval.low, interval.high


def _draw(axes: Any, panel: Panel, points: Sequence[_Point]) -> None:
    """Draw one panel."""
    x, y, low, high = np.array(points).T
    if panel.kind == "accuracy":
        bars = 100 * np.array([y - low, high - y])
        axes.errorbar(x, 100 * y, yerr=bars, color=_COLOR, marker="o", markersize=3, capsize=2)
    else:
        axes.plot(x, y, color=_COLOR, marker="o" if len(points) < 3 else None, markersize=3)
    axes.set_yscale(panel.scale if (y > 0).any() else "linear")
    limits = clipped_range([point[:2] for point in points]) if panel.kind == "loss" else None
    if limits:
        axes.set_ylim(*limits)
    axes.set_title(panel.title + (" (start cut off)" if limits else ""), fontsize="medium")
    axes.set_ylabel(panel.unit)
    axes.grid(alpha=0.3)


def clipped_range(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Return the ends of an axis for losses after the start, if those of the start would take most of it."""
    every, last = [y for _, y in points], max((x for x, _ in points), default=0.0)
    rest = [y for x, y in points if x > _START * last]
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
