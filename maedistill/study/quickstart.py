"""The quickstart: the study of quickstart/study on real digits, its exports and their scores.

`commands/quickstart.py` reads the command line. Every step is a command that works alone, see `runner.py`.
"""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from maedistill.escaping import masked, say
from maedistill.exporting.scorecards import Row, read_rows, write_page
from maedistill.report.formatting import text_table
from maedistill.report.interactive import has_bokeh
from maedistill.report.recorded import PREDICTIONS
from maedistill.report.run_page import refresh
from maedistill.study.completion import is_of_last_end, is_scored
from maedistill.study.file import load_study
from maedistill.study.plan import StudyPlan
from maedistill.study.results import collect
from maedistill.study.results_page import write_results
from maedistill.study.runner import Step, run_steps
from maedistill.study.study_page import PAGE, write_study_page

SEED = 0
SCORE = "scorecard.json"  # in the folder of a fine-tuning
JOBS = 2  # concurrent training runs: each of these small networks gets half of the cores
STUDENT, TEACHER, BASELINE = "dmae", "teacher", "scratch"  # of the headline
TITLE = "Quickstart: one small student, three ways to begin with it"
NOTES = (
    "scikit-learn's 1,797 real digit scans at 32 px: pre-trained on 1,000 without labels, fine-tuned on 31 of them "
    "(three or four of each class) with labels, evaluated on the other 797. There is one seed. The students are one "
    "network, pre-trained for equal epochs and fine-tuned alike; DMAE learns from the teacher, whose training is not "
    "in its time. Trainings ran two at a time.",
    "Sizes and latencies: [comparison.md](comparison.md). Reconstructions: report.md in the folder of a pre-training.",
)


def run_quickstart(out: Path, *, epochs: float | None) -> None:
    """Run each step as a separate command; if a step fails, the steps that need it are not started.

    out: folder of the runs and the results. epochs: of every training, instead of the configs'.
    """
    start = time.perf_counter()
    shards, val = out / "shards", f"{out}/shards/val-*.tar"
    settings = [f"data.train={shards}/train-*.tar", f"data.val={val}"]
    if epochs is not None:
        settings += [f"optim.epochs={epochs:g}", f"optim.warmup_epochs={epochs / 10:g}"]
    written = (shards / "make_shards.json").is_file
    run_steps([Step("shards", ("shards", "digits", str(shards)), done=written)], out=out)
    study = load_study("quickstart/study")
    trainings = StudyPlan(study, out, [SEED], settings=settings).steps()
    runs = {name: str(net.steps(name, SEED)[1]) for name, net in (study.teachers | study.students).items()}
    run_steps([*trainings, *(_export(name, run, out) for name, run in runs.items())], out=out, jobs=JOBS)
    # one at a time, because latency is measured
    run_steps([_score(name, run, val, out) for name, run in runs.items()], out=out)
    command, page = masked(shlex.join(sys.argv)), out / PAGE
    results = collect(study, out, [SEED])
    written_to = write_results(results, out, title=TITLE, command=command, notes=NOTES)
    rows = [replace(row, name=name) for name, run in runs.items() for row in read_rows([str(out / run / SCORE)])]
    write_page(rows, out, command=command)
    refresh(page, lambda: write_study_page(out, page), create=has_bokeh())
    summaries = {name: network["summary"] for name, network in results["networks"].items()}
    say("", *_table(rows, summaries), "", headline(rows, summaries))
    say(f"done in {(time.perf_counter() - start) / 60:.1f} minutes: open {page if page.is_file() else written_to}")
    scored = shlex.join(str(out / runs[name]) for name in (TEACHER, STUDENT))
    say(f"compare your own with these by size, accuracy and latency: maedistill compare {scored} RUN")


def _export(name: str, run: str, out: Path) -> Step:
    """Return the step that exports a network as a timm model to its run's folder."""
    exported = partial(is_of_last_end, out / run / "export" / "export.json", out / run)
    return Step(f"{name}/export", ("export", str(out / run)), needs=(run,), done=exported)


def _score(name: str, run: str, shards: str, out: Path) -> Step:
    """Return the step that measures accuracy and latency of an export."""
    score, predictions = out / run / SCORE, out / run / PREDICTIONS
    command = ("evaluate", str(out / run / "export"), shards, "--json", str(score), "--predictions", str(predictions))
    return Step(f"{name}/score", command, done=lambda: is_scored(score, shards) and predictions.is_file())


def _table(rows: Sequence[Row], summaries: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table for a terminal: accuracy, difference, size, latency."""
    lines = []
    for row in rows:
        score, gain = row.score, summaries[row.name]["difference"]
        share = f"{100 * row.top1.value:.1f} % ({score.top1_correct} of {score.images})"
        points = "-" if gain["mean"] is None else f"{100 * gain['mean']:+.1f} ({_range(gain)})"
        interval = f"{100 * row.top1.low:.1f} to {100 * row.top1.high:.1f}"
        latency = "-" if score.latency_ms is None else f"{score.latency_ms:.2f} ms"
        lines.append([row.name, share, interval, points, f"{score.parameters / 1e6:.2f} M", latency])
    return text_table(["network", "top-1", "95 % interval", f"against {BASELINE}", "parameters", "latency"], lines)


def headline(rows: Sequence[Row], summaries: Mapping[str, Any]) -> str:
    """Say in a sentence how much the student gained from distillation, and whether it may be chance."""
    gain = summaries[STUDENT]["difference"]
    one, large = ({row.name: row for row in rows}[name] for name in (STUDENT, TEACHER))
    sizes = f"{one.score.parameters / 1e6:.2f} M parameters, {one.score.parameters / large.score.parameters:.2f} of the"
    text = (
        f"{STUDENT} ({sizes} teacher's) has {100 * one.top1.value:.1f} % top-1, "
        f"{100 * one.top1.value / large.top1.value:.0f} % of the teacher's {100 * large.top1.value:.1f} %; "
        f"{100 * gain['mean']:+.1f} points over the same network from scratch (95 % interval of the difference "
        f"{_range(gain)}, {gain['interval']})"
    )
    is_chance = gain["low"] <= 0 <= gain["high"]
    return f"{text}. The interval includes 0: chance may explain the difference" if is_chance else text


def _range(gain: Mapping[str, Any]) -> str:
    return f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
