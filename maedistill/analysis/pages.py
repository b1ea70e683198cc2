"""The results as a page and pictures: OUT/knowledge.md, metrics.png, course.png, maps.png.

Pictures need matplotlib and are left out without it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from maedistill.analysis.concepts import METRICS, Array
from maedistill.analysis.seeds import group_seeds
from maedistill.escaping import code, markdown
from maedistill.report.charts import network_colors, new_canvas, plain, save
from maedistill.report.formatting import markdown_table
from maedistill.runs.records import write_text

_SHOWN_IMAGES, _SHOWN_STEPS = 3, 6
_REASONS = {
    "no_response": "features that do not depend on the image",
    "one_sided": "all cells in the foreground, or none",
    "foreground_discarded": "a background that is discarded less than the foreground",
}


def write_pages(
    result: Mapping[str, Any], out: Path, *, pixels: Tensor, maps: Mapping[str, Array], foreground: Array | None
) -> None:
    """Write the page, then the pictures that it shows.

    pixels: uint8 [I, 3, s, s] of the images that count. maps: [K, I, n] of each network, in nats below the mean
    background cell. foreground: bool [I, n].
    """
    drawn = result["networks"] and new_canvas(figsize=(1, 1)) is not None
    pictures = {"metrics": "metrics with intervals", "course": "concepts through training", "maps": "maps of entropies"}
    shown = [f"![{text}]({name}.png)\n" for name, text in pictures.items() if drawn]
    write_text(out / "knowledge.md", "\n".join([*_lines(result), "", *shown]))
    for name in pictures if not drawn else ():
        (out / f"{name}.png").unlink(missing_ok=True)  # of another foreground
    if drawn:
        networks, first = _drawn(result)
        draw_metrics(networks, out / "metrics.png")
        draw_course(networks, out / "course.png")
        draw_maps(
            result, out / "maps.png", pixels=pixels, maps={name: maps[name] for name in first}, foreground=foreground
        )


def _drawn(result: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """Return what charts show, and whose maps are drawn: groups of seeds and their first networks, and other networks.

    A group whose networks keep different steps is shown network by network.
    """
    drawn, first, grouped = dict[str, Any](), list[str](), dict[str, str]()
    for group, seeds in group_seeds([*result["networks"]]).items():
        if "checkpoints" in result["seeds"][group]:
            grouped |= dict.fromkeys(seeds.values(), group)
    for name, network in result["networks"].items():
        shown = grouped.get(name, name)
        first += [name] if shown not in drawn else []
        drawn[shown] = result["seeds"][shown] if name in grouped else network
    return drawn, first


def _lines(result: Mapping[str, Any]) -> list[str]:
    networks, settings = result["networks"], result["settings"]
    reasons = [f"{count} for {_REASONS[name]}" for name, count in result["left_out"].items() if count]
    lines = [
        "# Quantified knowledge",
        "",
        f"{len(result['counted'])} of {len(result['chosen'])} images count for all networks and checkpoints"
        + (f"; left out: {', '.join(reasons)} (an image may have several reasons)." if reasons else "."),
        f"{settings['grid']} x {settings['grid']} cells, mean entropy {settings['entropy']:g} nats; a concept is "
        f"{result['margin']:g} nats below the mean background cell. Foreground: {code(result['foreground'])}.",
        "",
    ]
    if not networks:
        return lines
    if result["seeds"]:
        differences = {name: one["difference"] for name, one in result["seeds"].items() if "difference" in one}
        lines += [
            "## Over seeds",
            "",
            "Means on these images. In brackets: 95 % intervals over seeds, Student's t.",
            "",
        ]
        lines += [*_metrics_table(result["seeds"], differences), ""]
    lines += ["## Each network", "", "In brackets: 95 % intervals over images, paired for differences.", ""]
    lines += [*_metrics_table(networks, result["differences"]), ""]
    for name, one in networks.items():
        columns = [key for key in one["checkpoints"][0] if key != "step"]
        rows = [[f"{state['step']:,}", *(_cell(state[key]) for key in columns)] for state in one["checkpoints"]]
        table = markdown_table(["step", *(column.replace("_", " ") for column in columns)], rows)
        lines += [f"## {markdown(name)}", "", *table, ""]
    return lines


def _metrics_table(networks: Mapping[str, Any], differences: Mapping[str, Any]) -> list[str]:
    """Return a row for each network, or group of seeds, then one for each difference."""
    named = {name: one["metrics"] for name, one in networks.items()}
    kinds = _kinds(named)
    heads = [METRICS[kind].partition(":")[0].partition(",")[0] for kind in kinds]
    rows = [[name, *(_cell(one.get(kind)) for kind in kinds)] for name, one in named.items()]
    for name, one in differences.items():
        rows.append([f"{name} - {one['to']}", *(_cell(one["metrics"].get(kind), "+") for kind in kinds)])
    return markdown_table(["network", *heads], rows)


def _kinds(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the metrics that some network has: those with one checkpoint have fewer."""
    return [kind for kind in METRICS if any(kind in one for one in metrics.values())]


def _cell(metric: Any, sign: str = "") -> str:
    """Format a number, or a metric with its interval."""
    value, *ends = _ends(metric) if isinstance(metric, Mapping) else [metric]
    if value is None:
        return "–"
    return f"{value:{sign}.3g}" + (f" ({ends[0]:{sign}.3g} to {ends[1]:{sign}.3g})" if ends else "")


def _ends(metric: Mapping[str, Any]) -> list[Any]:
    """Return a metric's value with the ends of its interval, if it has one."""
    return [metric["value"], *(metric[key] for key in ("low", "high") if metric["low"] is not None)]


def draw_metrics(summaries: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each metric: one bar per network or group of seeds, with its interval."""
    networks = {name: one["metrics"] for name, one in summaries.items()}
    names = _kinds(networks)
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    canvas = new_canvas(figsize=(4.2 * columns, lines * (1.1 + 0.42 * len(networks))))
    panels = canvas.figure.subplots(lines, columns, squeeze=False)
    colors = network_colors(list(networks))
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for number, (name, panel) in enumerate(zip(names, panels.flat, strict=False)):
        for row, (network, one) in enumerate(networks.items()):
            if name in one and one[name]["value"] is not None:
                value, *ends = _ends(one[name])
                panel.barh(row, value, color=colors[network], height=0.7)
                bars = [[max(0.0, sign * (end - value))] for sign, end in zip((-1, 1), ends, strict=False)]
                panel.errorbar(value, row, xerr=bars or None, color="black", capsize=3)
        panel.set_yticks(range(len(networks)), [plain(one) if number % columns == 0 else "" for one in networks])
        panel.set_ylim(len(networks) - 0.4, -0.6)  # the first network on top
        panel.set_xlim(left=0)
        panel.set_title(METRICS[name], fontsize="small")
        panel.grid(axis="x", alpha=0.3)
    save(canvas, path)


def draw_course(networks: Mapping[str, Any], path: Path) -> None:
    """Plot the mean numbers of concepts over the weight distance: foreground solid, background dashed."""
    canvas = new_canvas(figsize=(10.4, 4.2))
    label = "distance travelled by the weights, relative to the norm of the first checkpoint"
    axes = canvas.figure.add_subplot(xlabel=label, ylabel="concepts, cells per image")
    colors = network_colors(list(networks))
    styles = {"concepts": "-", "foreground": "-", "background": "--"}
    for network, one in networks.items():
        for kind in (kind for kind in styles if kind in one["checkpoints"][0]):
            x, y = zip(*[(state["weight_distance"], state[kind]["value"]) for state in one["checkpoints"]], strict=True)
            label = plain(f"{network}, {kind}")
            axes.plot(x, y, styles[kind], color=colors[network], marker="o", markersize=4, label=label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    canvas.figure.legend(loc="outside right upper")
    save(canvas, path)


def draw_maps(
    result: Mapping[str, Any], path: Path, *, pixels: Tensor, maps: Mapping[str, Array], foreground: Array | None
) -> None:
    """Draw the maps of a few images through training: one line per image and network."""
    grid, shown = result["settings"]["grid"], min(_SHOWN_IMAGES, len(pixels))
    chosen = {name: _spread(len(one)) for name, one in maps.items()}
    columns = 1 + max(map(len, chosen.values()))
    lines = [(image, name) for image in range(shown) for name in chosen]
    canvas = new_canvas(figsize=(1.7 * columns + 1.4, 1.75 * len(lines) + 0.4))
    panels = canvas.figure.subplots(len(lines), columns, squeeze=False)
    limit = max(np.quantile(np.abs(one[:, :shown]), 0.98) for one in maps.values())
    drawn = None
    for line, (image, name) in zip(panels, lines, strict=True):
        for panel in line:
            panel.set_xticks([])
            panel.set_yticks([])
        line[0].imshow(pixels[image].permute(1, 2, 0).numpy())
        line[0].set_ylabel(plain(name).replace("/", "/\n"), fontsize="small")
        for place, panel in enumerate(line[1:]):
            if place >= len(chosen[name]):
                panel.set_axis_off()
                continue
            k = chosen[name][place]
            drawn = panel.imshow(maps[name][k, image].reshape(grid, grid), cmap="RdBu_r", vmin=-limit, vmax=limit)
            panel.set_title(f"step {result['networks'][name]['checkpoints'][k]['step']:,}", fontsize="small")
            if foreground is not None:
                edge = np.kron(foreground[image].reshape(grid, grid), np.ones((16, 16)))  # finer, for sharp corners
                ends = (-0.5, grid - 0.5, -0.5, grid - 0.5)
                panel.contour(edge, levels=[0.5], extent=ends, colors="black", linewidths=0.8)
    label = "nats below the mean background cell; red: needed"
    canvas.figure.colorbar(drawn, ax=panels, label=label, shrink=min(1.0, 3 / len(lines)))
    save(canvas, path)


def _spread(count: int) -> list[int]:
    """Return up to `_SHOWN_STEPS` of the numbers 0 to count - 1, evenly spread, with the first and the last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, _SHOWN_STEPS))})
