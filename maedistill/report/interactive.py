"""Interactive plots by Bokeh: curves over training, and networks by accuracy, size and latency.

    records of runs -> curves -> {title: figure}        networks -> bubbles -> figure
    {key: figure} -> embed -> the script and the places for a page; page.js switches axes, lines and colors

No text from outside goes into a plot except as data of a column, which Bokeh shows as text. Names are HTML beside it.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from maedistill.errors import ConfigError
from maedistill.escaping import shown
from maedistill.report.charts import side_by_side
from maedistill.report.curves import PANELS, Panel, clipped_range, mean_metric
from maedistill.report.intervals import of_count
from maedistill.report.markup import Html, element

if TYPE_CHECKING:  # the extra `report` brings it, and it takes half a second
    from bokeh.plotting import figure

COLORS = ("#3b7ddd", "#e8833a", "#2fa36b", "#d64f5b", "#8e6bd0", "#a9714b", "#d66fb0", "#7c8794", "#b3a125", "#25a9b8")
_MOST_POINTS, _FEWEST_POINTS, _MOST_NAME = 1800, 60, 60  # points of all runs in a panel; points of one; characters
_Records = Sequence[Mapping[str, Any]]


def has_bokeh() -> bool:
    """Return whether Bokeh is installed."""
    return find_spec("bokeh") is not None


def require_bokeh() -> None:
    """Raise ConfigError unless Bokeh is installed."""
    if not has_bokeh():
        raise ConfigError(
            "report pages need Bokeh, which is not installed", "install it: pip install 'maedistill[report]'"
        )


def color_of(place: int) -> str:
    """Return the color of a run by its place on the page."""
    return COLORS[place % len(COLORS)]


def curves(runs: Mapping[str, _Records], places: Sequence[int]) -> dict[str, "figure"]:
    """Return a figure for each quantity that any run records, by title. Each run has a line. places: of its color."""
    most = max(_FEWEST_POINTS, min(300, _MOST_POINTS // max(1, len(runs))))
    figures, x_range = {}, None
    known = {metric for records in runs.values() for record in records for metric in record}
    for panel in (panel for panel in PANELS if any(metric.startswith(panel.name) for metric in known)):
        lines = {name: _columns(records, panel, most) for name, records in runs.items()}
        if any(line["y"] for line in lines.values()):
            plot = _figure(panel.title, panel.unit, x_range)
            x_range = plot.x_range
            _draw(plot, panel, lines, places)
            figures[panel.title] = plot
    return figures


def bubbles(networks: Sequence[Mapping[str, Any]]) -> "figure":
    """Return the chart of networks: top-1 over latency, or over size without any; the area grows with the parameters.

    networks: name, place (of its color), top1, low, high, parameters, latency_ms or None; accuracies are fractions.
    """
    from bokeh.models import Range1d

    timed = [one for one in networks if one["latency_ms"] is not None]
    drawn, x_of = timed or networks, "latency_ms" if timed else "parameters"
    label = "latency of one image, ms" if timed else "parameters"
    most = max(one["parameters"] for one in drawn)
    places = side_by_side({one["name"]: (one[x_of], one["top1"]) for one in drawn})
    x_range = Range1d(0, 1.15 * max(places.values()))
    plot = _figure("networks", "top-1, %, with 95 % interval", x_range, height=380, x_label=label)
    for network in drawn:
        values = {name: [100 * network[name]] for name in ("top1", "low", "high")}
        values |= {"latency": [network["latency_ms"] or 0], "parameters": [network["parameters"] / 1e6]}
        values |= {"x": [places[network["name"]]], "run": [shown(network["name"])[:_MOST_NAME]]}
        color, size = color_of(network["place"]), 12 + 34 * (network["parameters"] / most) ** 0.5
        source = _source(values)
        bar = plot.segment("x", "low", "x", "high", source=source, line_color=color, line_width=2)
        disc = plot.scatter("x", "top1", source=source, size=size, color=color, fill_alpha=0.6)
        bar.tags = disc.tags = [network["place"]]
        tips = [("network", "@run"), ("top-1", "@top1{%.4g} % (@low{%.4g} to @high{%.4g})")]
        tips += [("parameters", "@parameters{%.3g} M"), *([("latency", "@latency{%.3g} ms")] if timed else [])]
        _hover(plot, disc, tips, ["top1", "low", "high", "parameters", "latency"], mode="mouse")
    return plot


def embed(figures: Mapping[str, "figure"]) -> tuple[str, dict[str, Html]]:
    """Return the script that fills all places, BokehJS included, and the place of each figure."""
    from bokeh.embed import components
    from bokeh.resources import Resources

    script, places = components(dict(figures), wrap_script=False)
    library = "\n".join(Resources(mode="inline", components=["bokeh"], minified=True).js_raw)
    safe = library.replace("</script", "<\\/script")
    return f"{safe}\n</script><script>{script}", {key: Html(place) for key, place in places.items()}


def legend(names: Mapping[str, int]) -> Html:
    """Return a switch for the lines of each run. names: to the place of its color."""
    return element("div", *(_switch(name, place) for name, place in names.items()), css="legend")


def _switch(name: str, place: int) -> Html:
    box = element("input", attributes={"type": "checkbox", "checked": "", "data-run": str(place)})
    dot = element("i", css="dot", attributes={"style": f"background:{color_of(place)}"})
    return element("label", box, dot, name)


def _columns(records: _Records, panel: Panel, most: int) -> dict[str, list[float]]:
    """Return the columns of a line, thinned out. An evaluation has the minutes of the training step before it."""
    points, minutes = list[tuple[float, ...]](), 0.0
    for record in records:
        minutes = record.get("trained_seconds", 60 * minutes) / 60
        value = mean_metric(record, panel.name)
        if isinstance(value, int | float) and "epoch" in record:
            low = high = float(value)
            if panel.kind == "accuracy" and (images := record.get("images")):
                interval = of_count(round(value * images), images)
                low, high = interval.low, interval.high
            scale = 100 if panel.kind == "accuracy" else 1
            points.append((record["epoch"], minutes, record["step"], scale * value, scale * low, scale * high))
    names = ("epoch", "minutes", "step", "y", "low", "high")
    return {name: [point[i] for point in _thinned(points, most)] for i, name in enumerate(names)}


def _thinned(points: Sequence[tuple[float, ...]], most: int) -> list[tuple[float, ...]]:
    """Return at most `most` points: the mean of each stretch, with its lowest and highest so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    thin = []
    for start, stop in pairwise(i * len(points) // most for i in range(most + 1)):
        _, _, _, y, low, high = zip(*points[start:stop], strict=True)
        thin.append((*points[stop - 1][:3], fmean(y), min(low), max(high)))
    return thin


def _draw(plot: "figure", panel: Panel, lines: Mapping[str, Mapping[str, list[float]]], places: Sequence[int]) -> None:
    """Draw the line of each run, with a band for the 95 % intervals of accuracies."""
    unit = " %" if panel.kind == "accuracy" else ""
    for place, (name, columns) in zip(places, lines.items(), strict=True):
        count = len(columns["y"])
        if not count:
            continue
        values = {**columns, "x": columns["epoch"]}
        source = _source(values | ({"run": [shown(name)[:_MOST_NAME]] * count} if len(lines) > 1 else {}))
        color, has_band = color_of(place), columns["low"] != columns["high"]
        line = plot.line("x", "y", source=source, line_color=color, line_width=2)
        drawn = [line]
        if has_band:
            drawn.append(plot.varea("x", "low", "high", source=source, fill_color=color, fill_alpha=0.18))
        if count <= 30:
            drawn.append(plot.scatter("x", "y", source=source, color=color, size=5))
        for renderer in drawn:
            renderer.tags = [place]
        what = "95 %" if panel.kind == "accuracy" else "lowest, highest"
        tips = [*([("run", "@run")] if len(lines) > 1 else []), ("value", f"@y{{%.4g}}{unit}")]
        tips += [(what, f"@low{{%.4g}} to @high{{%.4g}}{unit}")] if has_band else []
        tips += [("epoch", "@epoch{%.4g}"), ("step", "@step{%d}"), ("minutes", "@minutes{%.4g}")]
        _hover(plot, line, tips, ["y", "low", "high", "epoch", "step", "minutes"])
    points = [list(zip(c["epoch"], c["y"], strict=True)) for c in lines.values() if c["y"]]
    clip = clipped_range(points) if panel.kind == "loss" else None
    plot.tags = [{"clip": clip, "curve": True}]


def _figure(title: str, unit: str, x_range: Any, *, height: int = 250, x_label: str = "epoch") -> "figure":
    """Return an empty figure that is as wide as its place. Colors of text and grid are set by the page."""
    from bokeh.models import DataRange1d, PrintfTickFormatter, Range1d
    from bokeh.plotting import figure

    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        min_width=200,
        tools="pan,box_zoom,wheel_zoom,reset,save",
        active_drag="box_zoom",
        x_axis_label=x_label,
        y_axis_label=unit,
        x_range=x_range or DataRange1d(range_padding=0.03),
        y_range=Range1d(),  # page.js sets it to what the visible lines need
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        tags=[{"clip": None, "curve": False}],
    )
    plot.yaxis.formatter = PrintfTickFormatter(format="%.4g")
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.name = title
    return plot


def _source(columns: Mapping[str, Sequence[Any]]) -> Any:
    """Return the columns as a source; numbers as arrays, which take little room."""
    import numpy as np
    from bokeh.models import ColumnDataSource

    return ColumnDataSource({k: list(v) if k == "run" else np.array(v, dtype=np.float32) for k, v in columns.items()})


def _hover(plot: "figure", renderer: Any, tips: list[tuple[str, str]], numbers: list[str], mode: Any = "vline") -> None:
    from bokeh.models import HoverTool

    formats = {f"@{name}": "printf" for name in numbers}
    hover = HoverTool(renderers=[renderer], tooltips=tips, formatters=formats, mode=mode, point_policy="snap_to_data")
    hover.visible = False  # always on: it needs no button
    plot.add_tools(hover)
