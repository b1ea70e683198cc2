"""The results of a study in Markdown, with a chart: OUT/results.md, results.json and results.png.

Every number is read from the runs' files by `results.py`. A missing number is printed as a dash.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maedistill.errors import join_first
from maedistill.report.charts import accuracy_chart
from maedistill.report.run_report import KNN_CAVEAT, markdown_table
from maedistill.runs.metrics import duration
from maedistill.runs.records import write_text

_Facts = Mapping[str, Any]
_DIFFERENCES = "mean and deviation of the differences between runs of the same seed, in points."


def write_results(results: _Facts, out: Path, *, title: str, command: str) -> Path:
    """Write OUT/results.md and results.json from the output of `results.collect`, also for an unfinished study."""
    out.mkdir(parents=True, exist_ok=True)
    baseline = results["baseline"]
    summaries = {name: network["summary"] for name, network in results["networks"].items()}
    accuracies = {name: list(summary["each"].values()) for name, summary in summaries.items() if summary["each"]}
    chart = accuracy_chart(accuracies, out / "results.png")
    lines = [
        f"# {title}",
        "",
        "Fine-tuned top-1 on all validation images: mean ± standard deviation (n - 1) over seeds"
        + ("." if baseline is None else f"; `against {baseline}`: {_DIFFERENCES}"),
        "",
        *accuracy_table(summaries, baseline),
        "",
        *([f"![top-1 per network]({chart.name})", ""] if chart else []),
        *cost_table(summaries),
        "",
        KNN_CAVEAT,
        "",
        *_unfinished_lines(results["unfinished"]),
        f"Command: `{command}`",
        "",
    ]
    write_text(out / "results.json", json.dumps({"command": command, **results}, indent=1) + "\n")
    write_text(out / "results.md", "\n".join(lines))
    return out / "results.md"


def accuracy_table(summaries: Mapping[str, _Facts], baseline: str | None) -> list[str]:
    """Format a Markdown table of top-1, one line per network; also of test top-1 if there is any."""
    tested = any(summary["test_accuracy"]["n"] for summary in summaries.values())
    heads = ["network", "n", "top-1", "each seed", *([f"against {baseline}"] if baseline else [])]
    rows = []
    for name, summary in summaries.items():
        each = ", ".join(f"{seed}: {100 * value:.2f}" for seed, value in summary["each"].items())
        cells = [name, str(summary["accuracy"]["n"]), _points(summary["accuracy"], unit=" %"), each or "-"]
        cells += [_points(summary["difference"], sign="+")] if baseline else []
        cells += [_points(summary["test_accuracy"], unit=" %")] if tested else []
        rows.append(cells)
    return markdown_table([*heads, *(["test top-1"] if tested else [])], rows)


def cost_table(summaries: Mapping[str, _Facts]) -> list[str]:
    """Format a Markdown table of the runs' sizes, losses and times, as means over seeds."""
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
    heads = ["network", "parameters", "pre-training", "pixel loss", "kNN", "time", "fine-tuning", "time"]
    targets = {summary["pixel_target"] for summary in summaries.values()} - {None}
    caveat = ["", "Pixel losses of different targets do not compare."] if len(targets) > 1 else []
    return [*markdown_table(heads, rows), *caveat]


def _unfinished_lines(unfinished: Sequence[_Facts]) -> list[str]:
    """List every run that is in progress or ended early, and the first few runs that have not started."""
    begun = [
        f"{run['run']} (at epoch {run['epochs']:.1f}{', ended: ' + run['ended'] if run['ended'] else ''})"
        for run in unfinished
        if run["epochs"] or run["ended"]
    ]
    waiting = [run["run"] for run in unfinished if not run["epochs"] and not run["ended"]]
    parts = [", ".join(begun)] if begun else []
    parts += [f"not begun: {join_first(waiting, 5)}"] if waiting else []
    return [f"**Not finished, and not counted: {'; '.join(parts)}.**", ""] if parts else []


def _points(stats: _Facts, *, unit: str = "", sign: str = "") -> str:
    """Format statistics over accuracies in percent, `57.01 ± 0.45 %`; without the deviation for a single value."""
    spread = "" if stats["sd"] is None else f" ± {100 * stats['sd']:.2f}"
    return "-" if stats["mean"] is None else f"{100 * stats['mean']:{sign}.2f}{spread}{unit}"


def _mean(stats: _Facts, form: Callable[[float], str]) -> str:
    return "-" if stats["mean"] is None else form(stats["mean"])
