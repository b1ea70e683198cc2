"""OUT/results.html: the page of a study or of the quickstart, from OUT/results.json and the run folders."""

import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from maedistill.report import run_page
from maedistill.report.interactive import bubbles, legend
from maedistill.report.markup import command, element, table
from maedistill.report.page import Page
from maedistill.report.recorded import RecordedRun, is_run, read_json, read_run
from maedistill.study.results_page import accuracy_cells, cost_cells, interval_lines, unfinished_text

PAGE = "results.html"
_SCORES = ("scorecard.json", "test.json")  # of evaluate --json; those of the quickstart and of study --test
_MOST_DRAWN = 12  # networks whose curves, pictures and settings are shown


def write_study_page(out: Path, file: Path) -> Path:
    """Write the page of the study whose results.json is in OUT. Raises UserError if it cannot be read or written."""
    results = read_json(out / "results.json")
    networks = results["networks"]
    summaries = {name: network["summary"] for name, network in networks.items()}
    runs = _first_runs(out, networks)
    page = Page(results.get("title") or f"Results in {out}", f"A study of {len(networks)} networks")
    waiting = unfinished_text(results["unfinished"])
    intervals = [element("p", line, css="note") for line in interval_lines(summaries.values())]
    page.add(
        "Accuracy",
        *([element("p", f"Not finished, and not counted: {waiting}.", css="note")] if waiting else []),
        table(*accuracy_cells(summaries, results["baseline"])),
        *intervals,
    )
    discs = _discs(out, networks)
    names = legend({disc["name"]: disc["place"] for disc in discs})
    note = element("p", "The area grows with the parameters. Networks of one latency stand side by side.", css="note")
    page.add_plots("Accuracy, size and latency", {"networks": bubbles(discs)} if discs else {}, names, note, css="wide")
    page.add("Cost", table(*cost_cells(summaries)))
    for stage in ("pretrain", "finetune"):
        drawn = [run for run in runs if run.metadata["stage"] == stage][:_MOST_DRAWN]
        if drawn:
            run_page.add_runs(page, drawn, of="pre-training" if stage == "pretrain" else "fine-tuning")
    again = shlex.join(["maedistill", "report", str(out)])
    page.add("The study again", command(results["command"], "the study"), command(again, "this page again"))
    return page.write(file)


def _folder(out: Path, name: str, seed: str, stage: str) -> Path:
    return out / name / f"seed_{seed}" / stage


def _first_runs(out: Path, networks: Mapping[str, Any]) -> list[RecordedRun]:
    """Return the run of the first seed of each network and stage, if its folder is there."""
    found = []
    for place, (name, network) in enumerate(networks.items()):
        for stage in ("pretrain", "finetune"):
            folders = (_folder(out, name, seed, stage) for seed in network["runs"])
            found += [read_run(folder, name, place) for folder in list(filter(is_run, folders))[:1]]
    return found


def _discs(out: Path, networks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the chart shows of each network. Networks of one name and size share a latency."""
    discs, timed = list[dict[str, Any]](), dict[Any, float]()
    for place, (name, network) in enumerate(networks.items()):
        top1, parameters = network["summary"]["top1"], network["summary"]["parameters"]
        if top1["mean"] is None or parameters is None:
            continue
        kind = None
        for folder in (_folder(out, name, seed, "finetune") for seed in network["runs"]):
            for score in _SCORES:
                with suppress(OSError, KeyError):  # not evaluated, or without latency
                    kind = (read_json(folder / "run.json")["network"]["name"], parameters)
                    timed.setdefault(kind, read_json(folder / score)["latency_ms"])
        values = {"top1": top1["mean"], "low": top1["low"], "high": top1["high"], "parameters": parameters}
        discs.append({"name": name, "place": place, "kind": kind, **values})
    return [disc | {"latency_ms": timed.get(disc["kind"])} for disc in discs]
