"""The report of several networks: OUT/report.md with the size / accuracy / latency chart, losses and reconstructions.

{name: Network} of run folders, each exported and scored -> write_comparison -> OUT/report.md, networks.png, curves.png
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maedistill.report import run_report
from maedistill.report.charts import draw_curves, latency_chart
from maedistill.runs.folder import RunFolder
from maedistill.runs.metrics import duration, read_metrics
from maedistill.runs.records import write_text


@dataclass(frozen=True)
class ComparedNetwork:
    """The folders of one fine-tuned network. pretrain: None from scratch; score: maedistill evaluate's JSON file."""

    pretrain: Path | None
    finetune: Path
    export: Path
    score: Path


def write_comparison(
    networks: Mapping[str, ComparedNetwork], out: Path, *, title: str, notes: Sequence[str] = ()
) -> Path:
    """Write OUT/report.md: size, accuracy and speed of the networks, then losses, curves, pictures of pre-training."""
    scores = {name: json.loads(network.score.read_text()) for name, network in networks.items()}
    trained = {name: RunFolder(n.pretrain) for name, n in networks.items() if n.pretrain is not None}
    chart = latency_chart(scores, out / "networks.png")
    curve = draw_curves({name: read_metrics(run.path) for name, run in trained.items()}, out / "curves.png")
    devices = ", ".join(sorted({score["device"] for score in scores.values()}))
    lines = [f"# {title}", "", *(line for note in notes for line in (note, "")), *score_table(networks, scores), ""]
    lines += [f"Latency: median of one image at a time, {devices}; images/s in batches. MB: the exported weights.", ""]
    lines += [f"![size, accuracy and latency]({chart.name})", ""] if chart else []
    lines += ["## Pre-training", "", *run_report.losses_table(trained), "", run_report.KNN_CAVEAT, ""]
    lines += [f"![losses and kNN]({curve.name})", ""] if curve else []
    lines += [run_report.PICTURE_NOTE, ""]
    for name, run in trained.items():
        lines += [f"### {name}", "", *run_report.last_picture(run, out)]
    write_text(out / "report.md", "\n".join(lines))
    return out / "report.md"


def score_table(networks: Mapping[str, ComparedNetwork], scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format a Markdown table of fine-tuned, exported and scored networks, one line each."""
    heads = ["network", "top-1", "parameters", "MB", "latency", "images/s", "pre-training", "fine-tuning"]
    rows = []
    for name, network in networks.items():
        score, size = scores[name], (network.export / "model.safetensors").stat().st_size
        cells = [name, run_report.percent(score["top1"], score["images"]), f"{score['parameters'] / 1e6:.2f} M"]
        cells += [f"{size / 1e6:.2f}", f"{score['latency_ms']:.2f} ms", f"{score['images_per_second']:.0f}"]
        for run in (network.pretrain, network.finetune):
            cells.append("-" if run is None else duration(run_report.summary(read_metrics(run))["seconds"]))
        rows.append(cells)
    return run_report.markdown_table(heads, rows)
