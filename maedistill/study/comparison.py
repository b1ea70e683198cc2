"""Compare several runs in Markdown: the results of a study, and the report of the quickstart.

    results (results.py)                  -> OUT/results.md, results.json, results.png
    {name: Network} of run folders, each  -> OUT/report.md, with the size / accuracy / latency chart, the losses and
    exported and scored                      the last reconstructions of each student

Every number is read from the runs' files. A missing number is printed as a dash.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maedistill.report.run_report import (
    KNN_CAVEAT,
    PICTURE_NOTE,
    draw_curves,
    last_picture,
    losses_table,
    percent,
    summary,
)
from maedistill.runs.folder import RunFolder
from maedistill.runs.metrics import duration, read_metrics
from maedistill.runs.records import write_text
from maedistill.study.charts import accuracy_chart, latency_chart

_Facts = Mapping[str, Any]
_MOST_NAMED = 5  # runs that have not started
_DIFFERENCES = "mean and deviation of the differences between runs of the same seed, in points."


@dataclass(frozen=True)
class Network:
    """The folders of one fine-tuned network. pretrain: None from scratch; score: tools/evaluate.py's JSON file."""

    pretrain: Path | None
    finetune: Path
    export: Path
    score: Path


def write_results(results: _Facts, out: Path, *, title: str, command: str) -> Path:
    """Write OUT/results.md and results.json from the output of `results.collect`, also for an unfinished study."""
    out.mkdir(parents=True, exist_ok=True)
    networks, baseline = results["networks"], results["baseline"]
    accuracies = {name: list(found["each"].values()) for name, found in _summaries(networks)}
    chart = accuracy_chart({name: values for name, values in accuracies.items() if values}, out / "results.png")
    lines = [
        f"# {title}",
        "",
        "Fine-tuned top-1 on all validation images: mean ± standard deviation (n - 1) over seeds"
        + ("." if baseline is None else f"; `against {baseline}`: {_DIFFERENCES}"),
        "",
        *accuracy_table(networks, baseline),
        "",
        *([f"![top-1 per network]({chart.name})", ""] if chart else []),
        *cost_table(networks),
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


def write_comparison(networks: Mapping[str, Network], out: Path, *, title: str, notes: Sequence[str] = ()) -> Path:
    """Write OUT/report.md: size, accuracy and speed of the networks, then losses, curves, pictures of pre-training."""
    rows = {name: scorecard(network) for name, network in networks.items()}
    trained = {name: RunFolder(n.pretrain) for name, n in networks.items() if n.pretrain is not None}
    records = {name: read_metrics(run.path) for name, run in trained.items()}
    losses = {name: (run.load_config(), summary(records[name])) for name, run in trained.items()}
    chart = latency_chart(rows, out / "networks.png")
    curve = draw_curves(records, out / "curves.png")
    devices = ", ".join(sorted({row["device"] for row in rows.values()}))
    lines = [f"# {title}", "", *(line for note in notes for line in (note, "")), *scorecard_table(rows), ""]
    lines += [f"Latency: median of one image at a time, {devices}; images/s in batches. MB: the exported weights.", ""]
    lines += [f"![size, accuracy and latency]({chart.name})", ""] if chart else []
    lines += ["## Pre-training", "", *losses_table(losses), "", KNN_CAVEAT, ""]
    lines += [f"![losses and kNN]({curve.name})", ""] if curve else []
    lines += [PICTURE_NOTE, ""]
    for name, run in trained.items():
        lines += [f"### {name}", "", *last_picture(run, out)]
    write_text(out / "report.md", "\n".join(lines))
    return out / "report.md"


def scorecard(network: Network) -> dict[str, Any]:
    """Return the numbers of one fine-tuned, exported and scored network."""
    score = json.loads(network.score.read_text())
    keys = ("top1", "images", "parameters", "latency_ms", "images_per_second", "device")
    return {
        **{key: score[key] for key in keys},
        "megabytes": (network.export / "model.safetensors").stat().st_size / 1e6,
        "pretrain_seconds": _seconds(network.pretrain),
        "finetune_seconds": _seconds(network.finetune),
    }


def scorecard_table(rows: Mapping[str, _Facts]) -> list[str]:
    """Format a Markdown table with one line per network."""
    lines = [
        "| network | top-1 | parameters | MB | latency | images/s | pre-training | fine-tuning |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [name, percent(row["top1"], row["images"]), _millions(row["parameters"]), f"{row['megabytes']:.2f}"]
        cells += [f"{row['latency_ms']:.2f} ms", f"{row['images_per_second']:.0f}"]
        times = (row["pretrain_seconds"], row["finetune_seconds"])
        cells += ["-" if time is None else duration(time) for time in times]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def accuracy_table(networks: Mapping[str, _Facts], baseline: str | None) -> list[str]:
    """Format a Markdown table of top-1, one line per network, from their summaries; also test top-1 if there is any."""
    tested = any(found["test_accuracy"]["n"] for _, found in _summaries(networks))
    heads = ["network", "n", "top-1", "each seed", *([f"against {baseline}"] if baseline else [])]
    heads += ["test top-1"] if tested else []
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, found in _summaries(networks):
        each = ", ".join(f"{seed}: {100 * value:.2f}" for seed, value in found["each"].items())
        cells = [name, str(found["accuracy"]["n"]), _points(found["accuracy"], unit=" %"), each or "-"]
        cells += [_points(found["difference"], sign="+")] if baseline else []
        cells += [_points(found["test_accuracy"], unit=" %")] if tested else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def cost_table(networks: Mapping[str, _Facts]) -> list[str]:
    """Format a Markdown table of the runs' sizes, losses and times, as means over seeds."""
    lines = [
        "| network | parameters | pre-training | pixel loss | kNN | time | fine-tuning | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in _summaries(networks):
        cells = [name, "-" if found["parameters"] is None else _millions(found["parameters"])]
        for stage in ("pretrain", "finetune"):
            epochs, images, time = (found[f"{stage}_{key}"] for key in ("epochs", "images", "seconds"))
            cells.append("-" if epochs is None else f"{epochs:g} epochs x {images:,}")
            if stage == "pretrain":
                cells += [_mean(found["pixels"], ".4f"), _mean(found["knn"], ".1%")]
            cells.append("-" if time["mean"] is None else duration(time["mean"]))
        lines.append(f"| {' | '.join(cells)} |")
    targets = {found["pixel_target"] for _, found in _summaries(networks)} - {None}
    return [*lines, *(["", "Pixel losses of different targets do not compare."] if len(targets) > 1 else [])]


def _summaries(networks: Mapping[str, _Facts]) -> list[tuple[str, _Facts]]:
    return [(name, network["summary"]) for name, network in networks.items()]


def _unfinished_lines(unfinished: Sequence[_Facts]) -> list[str]:
    """List every run that is in progress or ended early, and the first few runs that have not started."""
    if not unfinished:
        return []
    begun = [
        f"{run['run']} (at epoch {run['epochs']:.1f}{', ended: ' + run['ended'] if run['ended'] else ''})"
        for run in unfinished
        if run["epochs"] or run["ended"]
    ]
    waiting = [run["run"] for run in unfinished if not run["epochs"] and not run["ended"]]
    more = f" and {len(waiting) - _MOST_NAMED} more" if len(waiting) > _MOST_NAMED else ""
    parts = [", ".join(begun)] if begun else []
    parts += [f"not begun: {', '.join(waiting[:_MOST_NAMED])}{more}"] if waiting else []
    return [f"**Not finished, and not counted: {'; '.join(parts)}.**", ""]


def _points(found: _Facts, *, unit: str = "", sign: str = "") -> str:
    """Format statistics over accuracies in percent, `57.01 ± 0.45 %`; without the deviation for a single value."""
    if found["mean"] is None:
        return "-"
    spread = "" if found["sd"] is None else f" ± {100 * found['sd']:.2f}"
    return f"{100 * found['mean']:{sign}.2f}{spread}{unit}"


def _mean(found: _Facts, form: str) -> str:
    return "-" if found["mean"] is None else format(found["mean"], form).replace("%", " %")


def _seconds(run: Path | None) -> float | None:
    """Return the training time of a run."""
    return None if run is None else summary(read_metrics(run))["seconds"]


def _millions(parameters: float) -> str:
    return f"{parameters / 1e6:.2f} M"
