"""RUN/report.html, and one page for several runs side by side: what `maedistill report` writes from run folders.

Everything is read from what the runs have recorded. While a run trains, `refresh` makes a page again if it is there.
"""

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import all_keys, flat
from maedistill.escaping import warn
from maedistill.report.formatting import KNN_CAVEAT, interval_text, percent, score_text, short_names
from maedistill.report.interactive import curves, legend, require_bokeh
from maedistill.report.markup import Html, command, element, note, table
from maedistill.report.page import Page
from maedistill.report.page_pictures import reconstructions
from maedistill.report.page_predictions import predictions
from maedistill.report.recorded import RecordedRun, is_run, read_run, readable, written
from maedistill.report.run_report import PICTURE_NOTE, next_commands, part_scores, summary
from maedistill.runs.history import duration, own_method

PAGE = "report.html"
_MOST_PICTURED = 6  # runs whose pictures are shown; sheets of reconstructions, divided among them
_CONTROLS = Html(
    '<div class="controls"><span><button data-set="over" value="epoch" aria-pressed="true">epochs</button>'
    '<button data-set="over" value="minutes" aria-pressed="false">minutes</button></span>'
    '<span><button data-set="scale" value="linear" aria-pressed="true">linear</button>'
    '<button data-set="scale" value="log" aria-pressed="false">log</button></span></div>'
)
_Part = TypeVar("_Part")
_warned: set[Path] = set()


def refresh(page: Path, write: Callable[[], object], *, create: bool = False) -> None:
    """Update a page if it exists. create: write it in any case. It never raises: a warning gives the reason.

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
    """Update RUN/report.html, as `refresh` does. Every rank may call it; the first one writes.

    create: make it in any case, if the folder is that of a run.
    """
    from maedistill.processes import distributed  # it imports torch, which a training has and the command has not

    folder = Path(os.path.expanduser(run))
    if distributed.is_main():
        refresh(folder / PAGE, lambda: write_page([folder], folder / PAGE), create=create and is_run(folder))


def write_page(folders: Sequence[Path], file: Path) -> Path:
    """Write the page of one run or of several, which are named by the parts of their paths that differ.

    Raises UserError without Bokeh, for damaged records, and if the file cannot be written.
    """
    require_bokeh()
    runs = [read_run(folder, name, i) for i, (name, folder) in enumerate(_names(folders).items())]
    alone, first = len(runs) == 1, runs[0]
    title = first.name if alone else f"{len(runs)} runs side by side"
    about = _of_each(runs, _about)[0] if alone else ", ".join(run.name for run in runs)
    page = Page(title, about, running=first.ended is None and file == folders[0] / PAGE)
    page.add("Results", _by_run("", runs, _of_each(runs, _results), css="tiles"))
    add_runs(page, runs)
    return page.write(file)


def add_runs(page: Page, runs: Sequence[RecordedRun], *, of: str = "") -> None:
    """Add curves, pictures, data and licenses, settings and commands of the runs. of: for headings, their stage."""
    of, alone = f" of {of}" if of else "", len(runs) == 1
    pictured, album = runs[:_MOST_PICTURED], page.album
    most = max(2, _MOST_PICTURED // len(pictured))

    def of_each(part: Callable[[RecordedRun], Html]) -> list[Html]:
        """Return a part of each run; of several, each is seen once its name is clicked."""
        parts = dict(zip((run.name for run in pictured), _of_each(pictured, part), strict=True))
        folded = [element("details", element("summary", name), text) for name, text in parts.items() if text]
        return list(filter(None, parts.values())) if alone else folded

    names = Html() if alone else legend({run.name: run.place for run in runs})
    caveat = note(KNN_CAVEAT if any("knn" in record for run in runs for record in run.records) else "")
    lines = curves({run.name: run.records for run in runs}, [run.place for run in runs])
    page.add_plots(f"Curves{of}", lines, _CONTROLS, names, caveat)
    few = note(f"Of the first {len(pictured)} of {len(runs)} runs." if len(pictured) < len(runs) else "")
    sheets = of_each(lambda run: reconstructions(run, album, most=most))
    page.add("Reconstructions", *sheets, *([note(PICTURE_NOTE), few] if sheets else []))
    shown = of_each(lambda run: predictions(run, album, share=len(pictured)))
    page.add("Predictions", *shown, few if shown else "")
    page.add(f"Data and licenses{of}", _by_run("", runs, _of_each(runs, _facts)))
    page.add(f"Settings{of}", *_settings(runs))
    commands = _of_each(runs, lambda run: _commands(run, alone=alone))
    page.add(f"Commands{of}", *(one for lines in commands for one in lines))


def _of_each(runs: Sequence[RecordedRun], part: Callable[[RecordedRun], _Part]) -> list[_Part]:
    """Return a part of each run. Raises DataError that names a run whose records are damaged."""
    parts = []
    for run in runs:
        with readable(run.path):
            parts.append(part(run))
    return parts


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """Return a name for each folder: its last parts, as few as tell all apart."""
    paths = {folder.resolve(): folder for folder in folders}
    return dict(zip(short_names([str(path) for path in paths]), paths.values(), strict=True))


def _by_run(first: str, runs: Sequence[RecordedRun], facts: Sequence[Mapping[str, str]], *, css: str = "") -> Html:
    """Return a table of facts with a column for each run. first: head of their names. css: of one run's table."""
    names = dict.fromkeys(name for one in facts for name in one)
    heads = [first, *(run.name for run in runs)] if len(runs) > 1 else []
    rows = table(heads, [[name, *(one.get(name, "-") for one in facts)] for name in names])
    return element("div", rows, css=css) if css and len(runs) == 1 else rows


def _about(run: RecordedRun) -> str:
    """Say in a line what a run is and how far."""
    config, own = run.config, own_method(run.metadata)
    stage = "fine-tuning" if isinstance(config, FinetuneConfig) else f"{own or config.method} pre-training"
    done = max((record.get("epoch", 0.0) for record in run.records), default=0.0)
    return f"{stage} of {run.network}, {run.state} at epoch {done:.4g} of {run.config.optim.epochs:g}"


def _results(run: RecordedRun) -> dict[str, str]:
    """Return the results so far."""
    facts, file = {"state": run.state}, run.path / "metrics.jsonl"
    facts |= {"last record": written(file)} if run.ended is None and file.is_file() else {}
    if scores := [record for record in run.records if "top1_correct" in record]:
        score = scores[-1]
        facts["top-1"] = percent(score["top1_correct"], score["images"])
        facts["95 % interval"] = interval_text(score["top1_correct"], score["images"])
        facts["top-5"] = percent(score["top5_correct"], score["images"])
        facts["validation loss"] = f"{score['val_loss']:.4g}"
    if averaged := [record for record in run.records if "ema_top1_correct" in record]:
        facts["moving average"] = score_text(averaged[-1]["ema_top1_correct"], averaged[-1]["ema_images"])
    facts |= {f"{name}: top-1": score for name, score in part_scores(run.records, run.metadata).items()}
    if any(record.get("loss") is not None for record in run.records):
        last = summary(run.records, run.path)
        facts["training loss"] = f"{last['loss']:.4g}"
        facts |= {"kNN": f"{last['knn']:.1%}"} if last["knn"] is not None else {}
        facts["training time"] = duration(last["seconds"])
        facts["images/s per rank"] = f"{last['rate']:,.0f}"
        facts |= {"left": duration(last["eta_seconds"])} if run.ended is None and last.get("eta_seconds") else {}
    return facts


def _facts(run: RecordedRun) -> dict[str, str]:
    """Return what went into a run: data, weights of others with their licenses, machine and versions."""
    metadata, start = run.metadata, (run.metadata.get("starts") or [{}])[-1]
    facts = {
        "network": run.network,
        "license of the weights used": metadata.get("license", "not stated"),
        "teacher": metadata.get("teacher") or "none",
        "start": metadata.get("init") or "from scratch",
    }
    for name, pattern in (("data", run.config.data.train), ("validation", run.config.data.val)):
        if data := metadata.get(name):
            text = f"{pattern}: {data['images']:,} images, fingerprint {data['fingerprint'][:12]}"
            facts["training data" if name == "data" else "validation data"] = text
    words = ("host", "device", "ranks", "threads", "precision")
    facts["machine"] = ", ".join(f"{word} {start[word]}" for word in words if word in start)
    versions = ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items())
    facts |= {"versions": versions, "folder": str(run.path)}
    return {name: text for name, text in facts.items() if text}


def _settings(runs: Sequence[RecordedRun]) -> list[Html]:
    """Return the settings in which the runs differ; of one run, those that are not the defaults."""
    settings = [{key: json.dumps(v, ensure_ascii=False) for key, v in flat(run.config).items()} for run in runs]
    defaults = {key: json.dumps(one.default, ensure_ascii=False) for key, one in all_keys(type(runs[0].config)).items()}
    compared, keys = settings + [defaults] * (len(runs) == 1), dict.fromkeys(key for one in settings for key in one)
    differing = [key for key in keys if len({one.get(key) for one in compared}) > 1]
    how = "are not the defaults" if len(runs) == 1 else "differ"
    shown_settings = [{key: one.get(key, "-") for key in differing} for one in settings]
    about = note(f"{len(differing)} of {len(keys)} keys {how}. config.yaml in the run folder has all.")
    return [about, _by_run("key", runs, shown_settings)]


def _commands(run: RecordedRun, *, alone: bool) -> list[Html]:
    """Return the command of the last start and, of a single run, those that come next."""
    starts = run.metadata.get("starts") or []
    about = f"the last of {len(starts)} starts" if len(starts) > 1 else "its start"
    lines = [command(start["command"], about if alone else f"{run.name}: {about}") for start in starts[-1:]]
    following = next_commands(run.path, run.config, run.metadata) if alone else []
    return lines + [command(shlex.join(words), "next") for words in following]
