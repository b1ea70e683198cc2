"""OUT/results.html: the page of a study or of the quickstart, from OUT/results.json and the run folders."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from maedistill.config.values import STAGES
from maedistill.report import run_page
from maedistill.report.interactive import bubbles, legend, require_bokeh
from maedistill.report.markup import command, joined, note, table
from maedistill.report.page import Page
from maedistill.report.page_pictures import open_picture
from maedistill.report.recorded import RecordedRun, is_run, read_json, read_run, readable
from maedistill.study.results_page import accuracy_cells, cost_cells, interval_lines, pixel_caveat, unfinished_text

PAGE = "results.html"
_SCORES = ("scorecard.json", "test.json")  # of evaluate --json; those of the quickstart and of study --test
_MOST_DRAWN = 12  # networks whose curves, pictures and settings are shown


def write_study_page(out: Path, file: Path) -> Path:
    """Write the page of the study whose results.json is in OUT.

    Raises UserError without Bokeh, for damaged records, and if the file cannot be written.
    """
    require_bokeh()
    with readable(out):
        results = read_json(out / "results.json")
        networks, waiting = results["networks"], unfinished_text(results["unfinished"])
        summaries = {name: network["summary"] for name, network in networks.items()}
        page = Page(results.get("title") or f"Results in {out}", f"A study of {len(networks)} networks")
        notes = joined(map(note, interval_lines(summaries.values())))
        unfinished = note(f"Not finished, and not counted: {waiting}." if waiting else "")
        page.add("Accuracy", unfinished, table(*accuracy_cells(summaries, results["baseline"])), notes)
        discs = _discs(out, networks)
        if timed := [disc for disc in discs if disc["latency"] is not None]:
            others = ", ".join(disc["name"] for disc in discs if disc["latency"] is None)
            about = "The area grows with the parameters. Networks with the same latency are drawn side by side."
            about += f" Without a latency: {others}." if others else ""
            names = legend({disc["name"]: disc["place"] for disc in timed})
            page.add_plots("Accuracy, size and latency", {"": bubbles(timed)}, names, note(about), css="wide")
        if chart := open_picture(out / "lines.png"):
            drawn = page.album.add(chart, "top-1 over epochs and minutes", css="chart")
            page.add("Accuracy over the length of training", drawn)
        page.add("Cost", table(*cost_cells(summaries)), note(pixel_caveat(summaries)))
        few = f" Curves, pictures and settings are those of {_MOST_DRAWN} networks." * (len(networks) > _MOST_DRAWN)
        page.add("Runs", note(f"What follows is of the first seed of each network.{few}"))
        for stage, root in STAGES.items():
            if runs := _first_runs(out, networks, stage):
                run_page.add_runs(page, runs, of=root.title)
        page.add("Commands", command(results["command"], "the study"))
    return page.write(file)


def _folders(out: Path, name: str, network: Mapping[str, Any], stage: str) -> list[Path]:
    """Return the run folders of a network's seeds. Raises ValueError for names that lead out of the study."""
    if any("/" in part or part in ("", ".", "..") for part in (name, *network["runs"])):
        raise ValueError("results.json has a name that leads to another folder")
    return [out / name / f"seed_{seed}" / stage for seed in network["runs"]]


def _first_runs(out: Path, networks: Mapping[str, Any], stage: str) -> list[RecordedRun]:
    """Return the run of the first seed of each network, if its folder is there, of as many as are drawn."""
    found = []
    for place, (name, network) in enumerate(networks.items()):
        folders = filter(is_run, _folders(out, name, network, stage))
        found += [(folder, name, place) for folder in list(folders)[:1]]
    return [read_run(*one) for one in found[:_MOST_DRAWN]]


def _discs(out: Path, networks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the chart shows of each network. Networks of one name and size share a latency."""
    discs, timed = list[dict[str, Any]](), dict[Any, float]()
    for place, (name, network) in enumerate(networks.items()):
        top1, parameters, kind = network["summary"]["top1"], network["summary"]["parameters"], None
        if top1["mean"] is None or parameters is None:
            continue
        for folder in _folders(out, name, network, "finetune"):
            for score in _SCORES:
                with suppress(OSError, KeyError):  # not evaluated, or without latency
                    kind = (read_json(folder / "run.json")["network"]["name"], parameters)
                    timed.setdefault(kind, float(read_json(folder / score)["latency_ms"]))
        values = {"top1": top1["mean"], "low": top1["low"], "high": top1["high"], "parameters": parameters}
        discs.append({"name": name, "place": place, "kind": kind, **values})
    return [disc | {"latency": timed.get(disc["kind"])} for disc in discs]
