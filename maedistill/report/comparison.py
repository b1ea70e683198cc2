"""The report of several networks: OUT/report.md with the size / accuracy / latency chart, losses and reconstructions.

{name: ComparedNetwork} of run folders, each exported and scored -> read_results -> {name: Result}
    -> text_table, headline, write_comparison -> OUT/report.md, networks.png, curves.png, curves_minutes.png

All networks are scored on the same images, so differences are paired. Networks of one architecture are timed once.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm

from maedistill.models.meta import meta_device
from maedistill.report import intervals, run_report
from maedistill.report.charts import Timed, latency_chart
from maedistill.report.curves import draw_curves
from maedistill.report.intervals import Interval
from maedistill.report.recorded import PREDICTIONS
from maedistill.runs.folder import RunFolder
from maedistill.runs.history import duration, read_metrics
from maedistill.runs.records import write_text


@dataclass(frozen=True)
class ComparedNetwork:
    """The folders of one fine-tuned network. pretrain: None from scratch; score: maedistill evaluate's JSON file."""

    pretrain: Path | None
    finetune: Path
    export: Path
    score: Path

    @property
    def architecture(self) -> str:
        """Return the layers of the network: networks with the same layers share a timing."""
        network = RunFolder(self.finetune).metadata()["network"]
        with meta_device():  # arguments may differ where one of them states a default
            return repr(timm.create_model(network["name"], pretrained=False, **network["arguments"]))


@dataclass(frozen=True)
class Result:
    """What was measured of one network. difference: of its top-1 to the baseline's, None for the baseline."""

    top1: Interval
    correct: int
    images: int
    difference: Interval | None
    parameters: int
    megabytes: float
    latency_ms: float
    images_per_second: float
    device: str


def read_results(networks: Mapping[str, ComparedNetwork], *, baseline: str) -> dict[str, Result]:
    """Read the scores of the networks, and their differences to the baseline.

    A score without latency gets that of the network of the same architecture that was timed.
    """
    scores = {name: json.loads(network.score.read_text()) for name, network in networks.items()}
    timed = {networks[name].architecture: score for name, score in scores.items() if "latency_ms" in score}
    results = {}
    for name, network in networks.items():
        score, speed = scores[name], timed[network.architecture]
        count, other = ((scores[one]["top1_correct"], scores[one]["images"]) for one in (name, baseline))
        files = (network.finetune / PREDICTIONS, networks[baseline].finetune / PREDICTIONS)
        results[name] = Result(
            intervals.of_count(score["top1_correct"], score["images"]),
            score["top1_correct"],
            score["images"],
            None if name == baseline else difference(count, other, files),
            score["parameters"],
            (network.export / "model.safetensors").stat().st_size / 1e6,
            speed["latency_ms"],
            speed["images_per_second"],
            speed["device"],
        )
    return results


def difference(one: tuple[int, int], other: tuple[int, int], predictions: tuple[Path, Path]) -> Interval:
    """Return the difference of two accuracies, (correct, images) each.

    It is paired if both files of predictions exist and are of these evaluations, on the same images.
    """
    answers = [_read_correct(path) for path in predictions]
    counts = [(sum(correct.values()), len(correct)) for correct in answers]
    if counts == [one, other] and answers[0].keys() == answers[1].keys():
        return intervals.of_pairs(list(answers[0].values()), [answers[1][key] for key in answers[0]])
    return intervals.of_difference(*one, *other)


def headline(results: Mapping[str, Result], *, student: str, teacher: str, baseline: str) -> str:
    """Say in a sentence what distillation brought the student, and whether chance may explain it."""
    one, large, gain = results[student], results[teacher], results[student].difference
    assert gain is not None
    size = f"{one.parameters / 1e6:.2f} M parameters, {one.parameters / large.parameters:.2f} of the teacher's"
    kept = f"{100 * one.top1.value:.1f} % top-1, {100 * one.top1.value / large.top1.value:.0f} % of the teacher's"
    text = (
        f"{student} ({size}) has {kept} {100 * large.top1.value:.1f} %; {100 * gain.value:+.1f} points over the same "
        f"network {'from scratch' if baseline == 'scratch' else f'as {baseline}'} (95 % interval of the difference "
        f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}, {gain.kind})"
    )
    return f"{text}. The interval includes 0: chance may explain the difference" if gain.includes_zero else text


def write_comparison(
    networks: Mapping[str, ComparedNetwork],
    results: Mapping[str, Result],
    out: Path,
    *,
    title: str,
    baseline: str,
    notes: Sequence[str] = (),
) -> Path:
    """Write OUT/report.md: size, accuracy and speed of the networks, then losses, curves, pictures of pre-training."""
    trained, order = (
        {name: RunFolder(n.pretrain) for name, n in networks.items() if n.pretrain is not None},
        list(networks),
    )
    points = {name: Timed(one.top1, one.megabytes, one.latency_ms) for name, one in results.items()}
    chart = latency_chart(points, out / "networks.png", order=order)
    records = {name: read_metrics(run.path) for name, run in trained.items()}
    curves = [
        draw_curves(records, out / "curves.png", order=order),
        draw_curves(records, out / "curves_minutes.png", order=order, over="minutes"),
    ]
    devices = ", ".join(sorted({one.device for one in results.values()}))
    lines = [f"# {title}", "", *(line for note in notes for line in (note, ""))]
    lines += [*run_report.markdown_table(*score_table(networks, results, baseline=baseline)), ""]
    lines += [
        f"Latency: median of one image at a time, {devices}, measured once for each architecture; images/s in batches. "
        "MB: the exported weights. Intervals: 95 %, Wilson's for top-1; differences are between networks on the same "
        "images. What another seed would give is in neither.",
        "",
    ]
    lines += [f"![size, accuracy and latency]({chart.name})", ""] if chart else []
    lines += ["## Pre-training", "", *run_report.losses_table(trained), "", run_report.KNN_CAVEAT, ""]
    lines += [line for curve in curves if curve for line in (f"![losses and kNN]({curve.name})", "")]
    lines += [run_report.PICTURE_NOTE, ""]
    for name, run in trained.items():
        lines += [f"### {name}", "", *run_report.last_picture(run, out)]
    write_text(out / "report.md", "\n".join(lines))
    return out / "report.md"


def score_table(
    networks: Mapping[str, ComparedNetwork], results: Mapping[str, Result], *, baseline: str
) -> tuple[list[str], list[list[str]]]:
    """Return the heads and rows of a table of fine-tuned, exported and scored networks, one line each."""
    heads, rows = _short_table(results, baseline=baseline)
    heads += ["MB", "images/s", "pre-training", "fine-tuning"]
    for cells, (name, network) in zip(rows, networks.items(), strict=True):
        one = results[name]
        cells += [f"{one.megabytes:.2f}", f"{one.images_per_second:.0f}"]
        for run in (network.pretrain, network.finetune):
            cells.append("-" if run is None else duration(run_report.summary(read_metrics(run))["seconds"]))
    return heads, rows


def text_table(results: Mapping[str, Result], *, baseline: str) -> list[str]:
    """Return the lines of a table for a terminal of 80 columns: accuracy, difference, size, latency."""
    heads, rows = _short_table(results, baseline=baseline)
    columns = zip(heads, *rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in (heads, *rows)
    ]


def _short_table(results: Mapping[str, Result], *, baseline: str) -> tuple[list[str], list[list[str]]]:
    heads = ["network", "top-1", "95 % interval", f"against {baseline}", "parameters", "latency"]
    rows = []
    for name, one in results.items():
        share = f"{100 * one.top1.value:.1f} % ({one.correct} of {one.images})"
        cells = [name, share, f"{100 * one.top1.low:.1f} to {100 * one.top1.high:.1f}", "-"]
        if (gain := one.difference) is not None:
            cells[-1] = f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
        rows.append([*cells, f"{one.parameters / 1e6:.2f} M", f"{one.latency_ms:.2f} ms"])
    return heads, rows


def _read_correct(file: Path) -> dict[str, bool]:
    """Return for each image id whether it was classified correctly; empty without the file."""
    if not file.is_file():
        return {}
    with file.open(newline="") as lines:
        # without a prediction: it could not be decoded
        return {row["id"]: row["label"] == row["top1"] for row in csv.DictReader(lines) if row["top1"]}
