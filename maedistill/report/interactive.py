"""Interactive plots by Bokeh: curves over training, and networks by accuracy, size and latency.

    records of runs -> curves -> {title: figure}        networks -> bubbles -> figure
    {key: figure} -> embed -> the script and the places for a page; page.js switches axes, lines and colors

Of text from outside, a plot has only the names of lines, which Bokeh shows as text.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from maedistill.errors import ConfigError
from maedistill.escaping import shown
from maedistill.report.charts import side_by_side
from maedistill.report.curves import Panel, clipped_range, find_panels, interval_ends, mean_metric
from maedistill.report.markup import Html, element

if TYPE_CHECKING:  # the extra `report` brings it, and it takes half a second
    from bokeh.plotting import figure

# of lines, in a light and in a dark page
_COLORS = ("#3b7ddd", "#d0701f", "#2fa36b", "#d64f5b", "#8e6bd0", "#a9714b", "#d66fb0", "#7c8794", "#94851a", "#1a8f9e")
_DASHES = ("solid", "dashed", "dotted")  # of the first ten lines, the next ten, and others
_MOST_POINTS, _MOST_NAME = 1800, 60  # points of all runs in a panel; characters
_COLUMNS = ("epoch", "minutes", "step", "y", "low", "high")
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


def curves(runs: Mapping[str, _Records], places: Sequence[int]) -> dict[str, "figure"]:
    """Return a figure for each quantity that any run records, by title. Each run has a line. places: of its color."""
    most = max(60, min(300, _MOST_POINTS // len(runs)))
    figures, x_range = {}, None
    for panel in find_panels(runs.values()):
        lines = {name: _columns(records, panel, most) for name, records in runs.items()}
        if any(line["y"] for line in lines.values()):
            plot = figures[panel.title] = _figure(panel.unit, x_range, name=panel.title)
            x_range = plot.x_range
            _draw(plot, panel, lines, places)
    return figures


def bubbles(networks: Sequence[Mapping[str, Any]]) -> "figure":
    """Return the chart of networks: top-1 in percent over latency; the area grows with the parameters.

    networks: name, place (of its color), top1, low, high, parameters, latency; accuracies are fractions.
    """
    from bokeh.models import Range1d

    most = max(one["parameters"] for one in networks)
    places = side_by_side({one["name"]: (one["latency"], one["top1"]) for one in networks})
    x_range = Range1d(0, 1.15 * max(places.values()))
    plot = _figure("top-1, %, with 95 % interval", x_range, height=380, x_label="latency of one image, ms")
    for network in networks:
        values = {name: [100 * network[name]] for name in ("top1", "low", "high")}
        values |= {"parameters": [network["parameters"] / 1e6], "latency": [network["latency"]]}
        values["x"] = [places[network["name"]]]
        (color, dash), size = _look(network["place"]), 12 + 34 * (network["parameters"] / most) ** 0.5
        source, look = _source(values), {"line_color": color, "line_dash": dash}
        bar = plot.segment("x", "low", "x", "high", source=source, line_width=2, **look)
        name = _shortened(network["name"])
        disc = plot.scatter("x", "top1", source=source, size=size, fill_color=color, fill_alpha=0.6, name=name, **look)
        bar.tags = disc.tags = [network["place"]]
        top1 = "@top1{%.5g} % (@low{%.5g} to @high{%.5g})"
        tips = {"network": "$name", "top-1": top1, "parameters": "@parameters{%.5g} M", "latency": "@latency{%.5g} ms"}
        _hover(plot, disc, tips, mode="mouse")
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
    switches = []
    for name, place in names.items():
        box = element("input", attributes={"type": "checkbox", "checked": "", "data-run": str(place)})
        color, dash = _look(place)
        fill = f";background:{color}" * (dash == "solid")
        dot = element("i", css="dot", attributes={"style": f"border:3px {dash} {color}{fill}"})
        switches.append(element("label", box, dot, name))
    return element("div", *switches, css="legend")


def _look(place: int) -> tuple[str, str]:
    """Return the color and the dashes of a line."""
    return _COLORS[place % len(_COLORS)], _DASHES[min(place // len(_COLORS), len(_DASHES) - 1)]


def _shortened(name: str) -> str:
    """Return a name for a tip. Paths may differ in their first part or in their last, so both stay."""
    name, half = shown(name), _MOST_NAME // 2
    return name if len(name) <= _MOST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def _columns(records: _Records, panel: Panel, most: int) -> dict[str, list[float]]:
    """Return the columns of a line, thinned out. An evaluation has the minutes of the training step before it."""
    points, minutes, scale = list[tuple[float, ...]](), 0.0, 100 if panel.kind == "accuracy" else 1
    for record in records:
        minutes = record.get("trained_seconds", 60 * minutes) / 60
        value = mean_metric(record, panel.name)
        if isinstance(value, int | float) and "epoch" in record:
            heights = (scale * one for one in (value, *interval_ends(record, panel, value)))
            points.append((record["epoch"], minutes, record["step"], *heights))
    return {name: [point[i] for point in _thinned(points, most)] for i, name in enumerate(_COLUMNS)}


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
    is_share = panel.kind == "accuracy"
    unit, band = (" %", "95 %") if is_share else ("", "lowest, highest")
    for place, (name, columns) in zip(places, lines.items(), strict=True):
        if not (count := len(columns["y"])):
            continue
        source, (color, dash) = _source(columns), _look(place)
        look = {"line_color": color, "line_dash": dash, "line_width": 2}
        line = plot.line("epoch", "y", source=source, name=_shortened(name), **look)
        drawn, tips = [line], {"run": "$name", "value": f"@y{{%.5g}}{unit}"}
        if columns["low"] != columns["high"]:
            drawn.append(plot.varea("epoch", "low", "high", source=source, fill_color=color, fill_alpha=0.18))
            tips[band] = f"@low{{%.5g}} to @high{{%.5g}}{unit}"
        if count <= 30:
            drawn.append(plot.scatter("epoch", "y", source=source, color=color, size=5))
        points = list(zip(columns["epoch"], columns["y"], strict=True))
        limits = clipped_range(points) if panel.kind == "loss" else None
        for renderer in drawn:
            renderer.tags = [place, limits and limits[1]]
        _hover(plot, line, tips | {"epoch": "@epoch{%.5g}", "step": "@step{%d}", "minutes": "@minutes{%.5g}"})
    plot.tags = ["curve"]


def _figure(unit: str, x_range: Any, *, name: str = "", height: int = 250, x_label: str = "epoch") -> "figure":
    """Return an empty figure that is as wide as its place. Colors of text and grid are set by the page."""
    from bokeh.models import DataRange1d, Range1d
    from bokeh.plotting import figure

    plot = figure(
        name=name,
        height=height,
        sizing_mode="stretch_width",
        min_width=200,
        tools="pan,box_zoom,wheel_zoom,reset,save",
        active_drag="box_zoom",
        x_axis_label=x_label,
        y_axis_label=unit,
        x_range=x_range or DataRange1d(range_padding=0.03),
        y_range=Range1d(),  # page.js sets it to what the visible lines need
    )
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = plot.toolbar.logo = None
    plot.toolbar.autohide = True
    return plot


def _source(columns: Mapping[str, Sequence[Any]]) -> Any:
    """Return the columns as a source; numbers as arrays, which take little room."""
    import numpy as np
    from bokeh.models import ColumnDataSource

    return ColumnDataSource({name: np.array(values, dtype=np.float32) for name, values in columns.items()})


def _hover(plot: "figure", renderer: Any, tips: Mapping[str, str], mode: Any = "vline") -> None:
    from bokeh.models import HoverTool

    formats = {f"@{name}": "printf" for name in (*_COLUMNS, "top1", "parameters", "latency")}
    tool = HoverTool(renderers=[renderer], tooltips=[*tips.items()], formatters=formats, mode=mode, visible=False)
    plot.add_tools(tool)  # always on: it needs no button
