"""RUN/report.html, and one page for several runs side by side: what `maedistill report` makes of run folders.

Everything is read from what the runs have recorded. While a run trains, `refresh` makes a page again if it is there.
"""

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import all_keys
from maedistill.escaping import shown
from maedistill.report.interactive import curves, legend
from maedistill.report.markup import Html, command, element, folded, table, tiles
from maedistill.report.page import Page
from maedistill.report.page_pictures import first_input, reconstructions
from maedistill.report.page_predictions import PREDICTIONS, predictions
from maedistill.report.recorded import RecordedRun, read_run
from maedistill.report.run_report import KNN_CAVEAT, PICTURE_NOTE, interval_text, next_commands, percent, summary
from maedistill.runs.history import duration
from maedistill.runs.records import warn

PAGE = "report.html"
_SHEETS = 6  # reconstruction sheets of a page, divided among its runs
_MOST_PICTURED = 6  # runs whose pictures are shown
_LONGEST = 300  # characters of a value in a table
_AXES = {"over": {"epoch": "epochs", "minutes": "minutes"}, "scale": {"linear": "linear", "log": "log"}}  # first: set
_warned: set[Path] = set()


def refresh(page: Path, write: Callable[[], object], *, create: bool = False) -> None:
    """Make a page again if it is there. create: make it in any case. It never ends what calls it: a warning says why.

    This is the one place where a training meets its page, so every error is caught here and said once.
    """
    try:
        if create or page.is_file():
            write()
    except Exception as error:
        if page not in _warned:
            warn(f"{page} is not up to date: {' '.join(str(error).splitlines()) or type(error).__name__}")
        _warned.add(page)


def refresh_run(run: str, *, create: bool = False) -> None:
    """Make RUN/report.html again, as `refresh` does. Every rank may call it: the first one writes."""
    from maedistill.processes import distributed  # it imports torch, which a training has and the command has not

    folder = Path(os.path.expanduser(run))
    if distributed.is_main():
        refresh(folder / PAGE, lambda: write_page([folder], folder / PAGE), create=create)


def write_page(folders: Sequence[Path], file: Path) -> Path:
    """Write the page of one run or of several, which are named by the parts of their paths that differ."""
    names = _names(folders)
    runs = [read_run(folder, name, place) for place, (name, folder) in enumerate(names.items())]
    first = runs[0]
    title = first.name if len(runs) == 1 else f"{len(runs)} runs side by side"
    about = _about(first) if len(runs) == 1 else ", ".join(run.name for run in runs)
    page = Page(title, about, running=any(run.ended is None for run in runs))
    add_results(page, runs)
    add_runs(page, runs)
    return page.write(file)


def add_results(page: Page, runs: Sequence[RecordedRun]) -> None:
    """Add the results of the runs: of one in large type, of several as a table."""
    results = {run.name: _results(run) for run in runs}
    if len(runs) == 1:
        page.add("Results", tiles(results[runs[0].name]))
        return
    heads = list(dict.fromkeys(name for facts in results.values() for name in facts))
    page.add(
        "Results",
        table(["run", *heads], [[run, *(facts.get(h, "-") for h in heads)] for run, facts in results.items()]),
    )


def add_runs(page: Page, runs: Sequence[RecordedRun], *, of: str = "") -> None:
    """Add curves, pictures, data and licenses, settings and commands of the runs. of: for headings, their stage."""
    of = f" of {of}" if of else ""
    add_curves(page, f"Curves{of}", runs)
    pictured, album = runs[:_MOST_PICTURED], page.album
    most = max(2, _SHEETS // len(pictured))

    def of_each(part: Callable[[RecordedRun], Html]) -> list[Html]:
        parts = {run.name: part(run) for run in pictured}
        return [folded(name, text) if len(runs) > 1 else text for name, text in parts.items() if text]

    sheets = of_each(lambda run: reconstructions(run, album, most=most))
    page.add("Reconstructions", *sheets, *([element("p", PICTURE_NOTE, css="note")] if sheets else []))
    page.add("Predictions", *of_each(lambda run: predictions(run, album, share=len(pictured))))
    page.add(f"Input of the first step{of}", *of_each(lambda run: first_input(run, album)))
    add_facts(page, f"Data and licenses{of}", runs)
    add_settings(page, f"Settings{of}", runs)
    page.add(f"Commands{of}", *(one for run in runs for one in _commands(run, alone=len(runs) == 1)))


def add_curves(page: Page, title: str, runs: Sequence[RecordedRun]) -> None:
    """Add the curves of the runs, with switches for their axes and lines."""
    groups = []
    for key, labels in _AXES.items():
        kinds = [{"type": "button", "data-set": key, "value": v, "aria-pressed": "false"} for v in labels]
        kinds[0]["aria-pressed"] = "true"
        buttons = zip(labels.values(), kinds, strict=True)
        groups.append(element("span", *(element("button", label, attributes=kind) for label, kind in buttons)))
    controls = element("div", *groups, css="controls")
    names = legend({run.name: run.place for run in runs}) if len(runs) > 1 else Html()
    probed = any("knn" in record for run in runs for record in run.records)
    note = element("p", KNN_CAVEAT, css="note") if probed else Html()
    page.add_plots(
        title, curves({run.name: run.records for run in runs}, [run.place for run in runs]), controls, names, note
    )


def add_facts(page: Page, title: str, runs: Sequence[RecordedRun]) -> None:
    """Add what went into the runs: data, weights of others with their licenses, machine and versions."""
    facts = [_facts(run) for run in runs]
    rows = [
        [name, *(one.get(name, "-") for one in facts)] for name in dict.fromkeys(name for one in facts for name in one)
    ]
    page.add(title, table(_heads("", runs), rows))


def add_settings(page: Page, title: str, runs: Sequence[RecordedRun]) -> None:
    """Add the settings: of several runs the differing ones first, of one those that are not the defaults."""
    settings = [run.settings for run in runs]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    if len(runs) == 1:
        defaults = all_keys(type(runs[0].config))
        differing = {key for key in keys if settings[0][key] != json.dumps(defaults[key].default, ensure_ascii=False)}
        about = "Not the defaults"
    else:
        differing, about = {key for key in keys if len({one.get(key) for one in settings}) > 1}, "Different"
    rows = [[key, *(_short(one.get(key, "-")) for one in settings)] for key in keys]
    heads = _heads("key", runs)
    marked = [row for row in rows if row[0] in differing]
    rest = table(heads, rows, marked=[row[0] in differing for row in rows])
    everything = folded(f"All {len(rows)} keys, with the {len(marked)} marked", rest)
    page.add(title, element("p", f"{about}: {len(marked)} of {len(rows)} keys."), table(heads, marked), everything)


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """Return a name for each folder: its last parts, as few as tell all apart."""
    paths = {folder.resolve(): folder for folder in folders}
    depth = next(n for n in range(1, 999) if len({path.parts[-n:] for path in paths}) == len(paths))
    return {"/".join(path.parts[-depth:]): folder for path, folder in paths.items()}


def _heads(first: str, runs: Sequence[RecordedRun]) -> list[str]:
    """Return the heads of a table with a column for each run: none for one."""
    return [first, *(run.name for run in runs)] if len(runs) > 1 else []


def _about(run: RecordedRun) -> str:
    """Say in a line what a run is and how far."""
    stage = "fine-tuning" if isinstance(run.config, FinetuneConfig) else f"{run.config.method} pre-training"
    done = max((record.get("epoch", 0.0) for record in run.records), default=0.0)
    return (
        f"{stage} of {run.metadata['network']['name']}, {run.state} at epoch {done:.4g} of {run.config.optim.epochs:g}"
    )


def _results(run: RecordedRun) -> dict[str, str]:
    """Return the results so far."""
    facts = {"state": run.state}
    if scores := [record for record in run.records if "top1_correct" in record]:
        score = scores[-1]
        facts["top-1"] = percent(score["top1_correct"], score["images"])
        facts["95 % interval"] = interval_text(score["top1_correct"], score["images"])
        facts["top-5"] = percent(score["top5_correct"], score["images"])
    if averaged := [record for record in run.records if "ema_top1_correct" in record]:
        facts["moving average"] = percent(averaged[-1]["ema_top1_correct"], averaged[-1]["ema_images"])
    if any(record.get("loss") is not None for record in run.records):
        last = summary(run.records)
        facts["loss"] = f"{last['loss']:.4g}"
        facts |= {"kNN": f"{last['knn']:.1%}"} if last["knn"] is not None else {}
        facts["epochs"] = f"{last['epoch']:.4g} of {run.config.optim.epochs:g}"
        facts["training time"] = duration(last["seconds"])
        facts["images/s per rank"] = f"{last['rate']:.0f}"
        facts |= {"left": duration(last["eta_seconds"])} if run.ended is None and last.get("eta_seconds") else {}
    return facts


def _facts(run: RecordedRun) -> dict[str, str]:
    """Return what went into a run."""
    metadata, start = run.metadata, (run.metadata.get("starts") or [{}])[-1]
    facts = {
        "network": metadata["network"]["name"],
        "license of the weights that went in": metadata.get("license", "not stated"),
        "teacher": metadata.get("teacher") or "none",
        "start": metadata.get("init") or "from scratch",
        "training data": f"{run.config.data.train}: {metadata['data']['images']:,} images",
        "fingerprint": metadata["data"]["fingerprint"][:12],
    }
    if validation := metadata.get("validation"):
        facts["validation data"] = f"{run.config.data.val}: {validation['images']:,} images"
        facts["its fingerprint"] = validation["fingerprint"][:12]
    machine = [f"{start[name]} {name}" for name in ("ranks", "threads") if name in start]
    facts["machine"] = ", ".join(
        [str(start[name]) for name in ("host", "device", "precision") if name in start] + machine
    )
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items())
    facts["folder"] = str(run.path)
    return {name: _short(value) for name, value in facts.items() if value}


def _commands(run: RecordedRun, *, alone: bool) -> list[Html]:
    """Return the command of the last start, those that come next, and what would add to the page."""
    of = "" if alone else f"{run.name}: "
    starts = run.metadata.get("starts") or []
    lines = [command(start["command"], f"{of}the last start of {len(starts)}") for start in starts[-1:]]
    following = [shown(shlex.join(words)) for words in next_commands(run.path, run.config, run.metadata)]
    lines += [command(line, f"{of}next") for line in (following if alone else [])]
    if alone and isinstance(run.config, FinetuneConfig) and not (run.path / PREDICTIONS).is_file():
        words = ["maedistill", "evaluate", str(run.path), run.config.data.val or "VALIDATION_SHARDS"]
        line = shlex.join([*words, "--predictions", str(run.path / PREDICTIONS)])
        lines.append(command(line, "for predictions with their images on this page"))
    if alone:
        lines.append(command(shlex.join(["maedistill", "report", str(run.path)]), "this page again"))
    return lines


def _short(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
