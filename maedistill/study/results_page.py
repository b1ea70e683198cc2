"""The results of a study in Markdown, with charts: OUT/results.md, results.json, results.png and lines.png.

Every number is read from the runs' files by `results.py`. A missing number is printed as a dash.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maedistill.errors import join_first
from maedistill.escaping import code, markdown
from maedistill.report.charts import Accuracy, Trained, accuracy_chart, length_chart
from maedistill.report.formatting import KNN_CAVEAT, markdown_table, text_table
from maedistill.report.intervals import Interval
from maedistill.runs.history import duration
from maedistill.runs.records import write_text

_Facts = Mapping[str, Any]
_DIFFERENCES = "mean and deviation of the differences between runs of the same seed, in points."
_INTERVALS = {  # where the 95 % intervals of a page come from
    "seeds": "over several seeds Student's t, for the mean",
    "images": "with one seed Wilson's, over images (Newcombe's for differences); it does not cover another seed",
    "paired images": "with one seed, differences of networks with predictions of the same images are paired",
}


def write_results(results: _Facts, out: Path, *, title: str, command: str, notes: Sequence[str] = ()) -> Path:
    """Write OUT/results.md and results.json from the output of `results.collect`, also for an unfinished study.

    notes: paragraphs in Markdown, below the title.
    """
    out.mkdir(parents=True, exist_ok=True)
    baseline = results["baseline"]
    summaries = {name: network["summary"] for name, network in results["networks"].items()}
    rows = {name: _accuracy(summary) for name, summary in summaries.items() if summary["each"]}
    chart = accuracy_chart(rows, out / "results.png", order=list(summaries))
    lengths = length_chart(_trained(results["lines"], summaries), out / "lines.png")
    if lengths is None:
        (out / "lines.png").unlink(missing_ok=True)  # of an earlier form of the study
    several = any(summary["top1"]["n"] > 1 for summary in summaries.values())
    spread = ": mean ± standard deviation (n - 1) over seeds" if several else ""
    lines = [
        f"# {markdown(title)}",
        "",
        *(line for note in notes for line in (note, "")),
        f"Fine-tuned top-1 on all validation images{spread}"
        + ("." if baseline is None else f"; {code(f'against {baseline}')}: {_DIFFERENCES}"),
        *interval_lines(summaries.values()),
        "",
        *markdown_table(*accuracy_cells(summaries, baseline)),
        "",
        *([f"![top-1 per network]({chart.name})", ""] if chart else []),
        *([f"![top-1 over epochs and minutes]({lengths.name})", ""] if lengths else []),
        *markdown_table(*cost_cells(summaries)),
        *(["", caveat] if (caveat := pixel_caveat(summaries)) else []),
        "",
        *([KNN_CAVEAT, ""] if any(summary["knn"]["n"] for summary in summaries.values()) else []),
        *unfinished_lines(results["unfinished"]),
        f"Command: {code(command)}",
        "",
    ]
    write_text(out / "results.json", json.dumps({"title": title, "command": command, **results}, indent=1) + "\n")
    write_text(out / "results.md", "\n".join(lines))
    return out / "results.md"


def terminal_table(results: _Facts) -> list[str]:
    """Return the lines of the table of accuracies for a terminal, without those of each seed."""
    summaries = {name: network["summary"] for name, network in results["networks"].items()}
    heads, rows = accuracy_cells(summaries, results["baseline"])
    each = heads.index("each seed")
    return text_table(heads[:each] + heads[each + 1 :], [row[:each] + row[each + 1 :] for row in rows])


def accuracy_cells(summaries: Mapping[str, _Facts], baseline: str | None) -> tuple[list[str], list[list[str]]]:
    """Return the heads and rows of the table of top-1, a row per network; also of test top-1 if there is any."""
    tested = any(summary["test_top1"]["n"] for summary in summaries.values())
    heads = ["network", "n", "top-1", "95 % interval", "each seed", *([f"against {baseline}"] if baseline else [])]
    rows = []
    for name, summary in summaries.items():
        each = ", ".join(f"{seed}: {100 * value:.2f}" for seed, value in summary["each"].items())
        cells = [
            name,
            str(summary["top1"]["n"]),
            _points(summary["top1"], unit=" %"),
            _range(summary["top1"]),
            each or "-",
        ]
        cells += [_difference(summary["difference"])] if baseline else []
        cells += [_points(summary["test_top1"], unit=" %"), _range(summary["test_top1"])] if tested else []
        rows.append(cells)
    return [*heads, *(["test top-1", "95 % interval"] if tested else [])], rows


def pixel_caveat(summaries: Mapping[str, _Facts]) -> str:
    """Say that pixel losses of different targets cannot be compared, if there are any."""
    targets = {summary["pixel_target"] for summary in summaries.values()} - {None}
    return "Pixel losses of different targets cannot be compared." if len(targets) > 1 else ""


def cost_cells(summaries: Mapping[str, _Facts]) -> tuple[list[str], list[list[str]]]:
    """Return the heads and rows of the table of the runs' sizes, losses and times, as means over seeds."""
    rows = []
    for name, summary in summaries.items():
        cells = [name, "-" if summary["parameters"] is None else f"{summary['parameters'] / 1e6:.2f} M"]
        for stage in ("pretrain", "finetune"):
            epochs, images = summary[f"{stage}_epochs"], summary[f"{stage}_images"]
            cells.append("-" if epochs is None else f"{epochs:g} epochs x {images:,}")
            if stage == "pretrain":
                cells.append(_mean(summary["pixels"], "{:.4f}".format))
                cells.append(_mean(summary["knn"], lambda share: f"{100 * share:.1f} %"))
            cells.append(_mean(summary[f"{stage}_seconds"], duration))
        rows.append(cells)
    return ["network", "parameters", "pre-training", "pixel loss", "kNN", "time", "fine-tuning", "time"], rows


def _accuracy(summary: _Facts) -> Accuracy:
    """Return what the chart shows of a row."""
    stats = summary["top1"]
    return Accuracy(
        list(summary["each"].values()), Interval(stats["mean"], stats["low"], stats["high"], stats["interval"])
    )


def _trained(lines: Mapping[str, Sequence[str]], summaries: Mapping[str, _Facts]) -> dict[str, list[Trained]]:
    """Return what the chart over epochs and minutes shows of each line: its rows that have a result."""
    return {
        line: [
            Trained(_accuracy(one), one["total_epochs"]["mean"], one["total_seconds"]["mean"] / 60)
            for one in (summaries[row] for row in rows)
            if one["each"] and one["total_epochs"]["n"]
        ]
        for line, rows in lines.items()
    }


def interval_lines(summaries: Iterable[_Facts]) -> list[str]:
    """Say where the 95 % intervals of the page come from."""
    used = {summary[name].get("interval") for summary in summaries for name in ("top1", "difference", "test_top1")}
    texts = [text for kind, text in _INTERVALS.items() if kind in used]
    return ["", f"95 % intervals: {'; '.join(texts)}."] if texts else []


def unfinished_lines(unfinished: Sequence[_Facts]) -> list[str]:
    """List every run that is in progress or ended early, and the first few runs that have not started."""
    text = unfinished_text(unfinished)
    return [f"**Not finished, and not counted: {markdown(text)}.**", ""] if text else []


def unfinished_text(unfinished: Sequence[_Facts]) -> str:
    """Name the runs that are not finished, as `unfinished_lines` does."""
    begun = [
        f"{run['run']} (at epoch {run['epochs']:.1f}{', ended: ' + run['ended'] if run['ended'] else ''})"
        for run in unfinished
        if run["epochs"] or run["ended"]
    ]
    waiting = [run["run"] for run in unfinished if not run["epochs"] and not run["ended"]]
    parts = [", ".join(begun)] if begun else []
    parts += [f"not begun: {join_first(waiting, 5)}"] if waiting else []
    return "; ".join(parts)


def _points(stats: _Facts, *, unit: str = "", sign: str = "") -> str:
    """Format statistics over accuracies in percent, `57.01 ± 0.45 %`; without the deviation for a single value."""
    spread = "" if stats["sd"] is None else f" ± {100 * stats['sd']:.2f}"
    return "-" if stats["mean"] is None else f"{100 * stats['mean']:{sign}.2f}{spread}{unit}"


def _range(stats: _Facts, sign: str = "") -> str:
    """Format an interval in percent, `55.10 to 58.92`."""
    return "-" if stats.get("low") is None else f"{100 * stats['low']:{sign}.2f} to {100 * stats['high']:{sign}.2f}"


def _difference(stats: _Facts) -> str:
    """Format a difference in points with its interval, `+3.33 ± 2.52 (-2.91 to +9.58)`."""
    return "-" if stats["mean"] is None else f"{_points(stats, sign='+')} ({_range(stats, sign='+')})"


def _mean(stats: _Facts, form: Callable[[float], str]) -> str:
    return "-" if stats["mean"] is None else form(stats["mean"])
