"""The results of a study, read from its run folders: the values of each run, statistics over seeds.

    OUT/NAME/seed_K/{pretrain,finetune}/{config.yaml,*.json,metrics.jsonl} -> collect -> the content of results.json

Only the progress of unfinished runs is reported, not their results. Accuracies are fractions, times in seconds. With
one seed, intervals are of the count of images, and differences are paired if both runs have predictions of the images.
"""

import csv
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import timm

from maedistill.config.finetune import FinetuneConfig
from maedistill.models.meta import meta_device
from maedistill.report import intervals
from maedistill.report.recorded import PREDICTIONS, readable
from maedistill.report.run_report import summary
from maedistill.runs.folder import RunFolder
from maedistill.runs.history import FINISHED, last_end, read_metrics
from maedistill.study.plan import TEST_FILE
from maedistill.study.schema import TEACHER_SEED, Study, TrainedNetwork

_Facts = Mapping[str, Any]
_MEASURES = {  # of each seed
    "pixels": ("pretrain", "pixels"),
    "knn": ("pretrain", "knn"),
    "pretrain_seconds": ("pretrain", "seconds"),
    "finetune_seconds": ("finetune", "seconds"),
    "total_epochs": ("total", "epochs"),
    "total_seconds": ("total", "seconds"),
}
_SIZES = {  # the same for all seeds
    "pretrain_epochs": ("pretrain", "epochs"),
    "pretrain_images": ("pretrain", "images"),
    "pixel_target": ("pretrain", "target"),
    "finetune_epochs": ("finetune", "epochs"),
    "finetune_images": ("finetune", "images"),
}


def collect(study: Study, out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the content of results.json: {"networks": {name: {"runs": {seed: values}, "summary": ...}}, ...}.

    "baseline" and "lines" are the study's, "unfinished" lists runs. Teachers come first. The values of a seed are
    {"pretrain": ..., "finetune": ..., "test": ..., "total": ...}, without those that do not exist (yet).
    """
    networks: dict[str, TrainedNetwork] = {**study.teachers, **study.rows()}
    steps, runs = list[str](), dict[str, dict[str, _Facts]]()
    for name, network in networks.items():
        pairs = {str(k): network.steps(name, k) for k in ([TEACHER_SEED] if name in study.teachers else seeds)}
        steps += [step for pair in pairs.values() for step in pair if step is not None]
        runs[name] = {seed: _facts_of(out, *pair) for seed, pair in pairs.items()}
    unfinished = []
    for step in dict.fromkeys(steps):
        if (ended := last_end(out / step)) != FINISHED:
            epochs = max((record["epoch"] for record in read_metrics(out / step)), default=0.0)
            unfinished.append({"run": step, "epochs": epochs, "ended": ended})
    baseline = runs.get(study.baseline or "", {})
    uncompared = {study.baseline, *study.teachers}
    summaries = {
        name: {"runs": seeds_runs, "summary": summarize(seeds_runs, {} if name in uncompared else baseline)}
        for name, seeds_runs in runs.items()
    }
    lines = {line: list(rows) for line, rows in study.lines.items()}
    return {"baseline": study.baseline, "lines": lines, "networks": summaries, "unfinished": unfinished}


def summarize(runs: Mapping[str, _Facts], baseline: Mapping[str, _Facts]) -> dict[str, Any]:
    """Return statistics of a network over its seeds, and of its differences to the baseline's runs of the same seeds.

    Sizes are taken from the first seed.
    """
    accuracies, before = _column(runs, "finetune", "top1"), _column(baseline, "finetune", "top1")
    parameters = _column(runs, "finetune", "parameters") or _column(runs, "pretrain", "parameters")
    tuned = [facts["finetune"] for facts in runs.values() if "finetune" in facts]
    tested = [facts["test"] for facts in runs.values() if "test" in facts]
    pairs = [(runs[seed]["finetune"], baseline[seed]["finetune"]) for seed in accuracies if seed in before]
    return {
        "each": accuracies,
        "top1": statistics(accuracies.values())
        | _interval(accuracies.values(), lambda: intervals.of_count(*_counts(tuned[0]))),
        "difference": statistics(differences := [one["top1"] - other["top1"] for one, other in pairs])
        | _interval(differences, lambda: _difference(*pairs[0])),
        "test_top1": statistics(scores := [facts["top1"] for facts in tested])
        | _interval(scores, lambda: intervals.of_count(*_counts(tested[0]))),
        **{name: statistics(_column(runs, *key).values()) for name, key in _MEASURES.items()},
        **{name: next(iter(_column(runs, *key).values()), None) for name, key in _SIZES.items()},
        "parameters": next(iter(parameters.values()), None),
    }


def statistics(values: Iterable[float]) -> dict[str, float | int | None]:
    """Return n, mean and sample standard deviation (n - 1); None for either if there are too few values."""
    values = list(values)
    return {
        "n": len(values),
        "mean": fmean(values) if values else None,
        "sd": stdev(values) if len(values) > 1 else None,
    }


def _interval(values: Collection[float], of_one: Callable[[], intervals.Interval]) -> dict[str, Any]:
    """Return the entries of the 95 % interval: over seeds, or of a single run; of None without any run."""
    if len(values) > 1:
        return intervals.of_seeds(list(values)).entries()
    return of_one().entries() if values else {"low": None, "high": None, "interval": None}


def _counts(facts: _Facts) -> tuple[int, int]:
    return facts["top1_correct"], facts["top1_images"]


def _difference(one: _Facts, other: _Facts) -> intervals.Interval:
    """Return the difference of two runs' accuracies.

    It is paired if both have predictions, which are of these evaluations and of the same images.
    """
    counts = [_counts(facts) for facts in (one, other)]
    answers = [_read_correct(Path(facts["folder"]) / PREDICTIONS) for facts in (one, other)]
    predicted = [(sum(correct.values()), len(correct)) for correct in answers]
    if predicted == counts and answers[0].keys() == answers[1].keys():
        return intervals.of_pairs(list(answers[0].values()), [answers[1][key] for key in answers[0]])
    return intervals.of_difference(*counts[0], *counts[1])


def _read_correct(file: Path) -> dict[str, bool]:
    """Return for each image id whether it was classified correctly; empty without the file."""
    if not file.is_file():
        return {}
    with file.open(newline="") as lines:
        # without a prediction: it could not be decoded
        return {row["id"]: row["label"] == row["top1"] for row in csv.DictReader(lines) if row["top1"]}


def run_facts(folder: RunFolder) -> dict[str, Any] | None:
    """Return the settings and the results of a finished run; None for a run that is not finished."""
    if last_end(folder.path) != FINISHED:
        return None
    with readable(folder.path):
        return _run_facts(folder)


def _run_facts(folder: RunFolder) -> dict[str, Any]:
    config, metadata, records = folder.load_config(), folder.metadata(), read_metrics(folder.path)
    last, network = summary(records, folder.path), metadata["network"]
    with meta_device():
        vit = timm.create_model(network["name"], pretrained=False, **network["arguments"])
    common = {
        "folder": str(folder.path),
        "command": metadata["starts"][-1]["command"],
        "epochs": config.optim.epochs,
        "images": metadata["data"]["images"],
        "seconds": last["seconds"],
        "images_per_second": last["rate"],
        "parameters": sum(parameter.numel() for parameter in vit.parameters()),
    }
    if isinstance(config, FinetuneConfig):
        score = [record for record in records if "top1" in record][-1]
        return common | _score(score) | {"start": metadata["init"]}
    losses = {"target": config.pixels.target, "pixels": last.get("pixels"), "knn": last["knn"]}
    return common | {"method": config.method} | losses


def _facts_of(out: Path, *steps: str | None) -> dict[str, Any]:
    """Return the facts of a network's finished runs by stage, of its test, and, if no run is missing, of all runs."""
    facts = dict[str, Any]()
    runs = {stage: step for stage, step in zip(("pretrain", "finetune"), steps, strict=True) if step is not None}
    for stage, step in runs.items():
        if (values := run_facts(RunFolder(out / step))) is not None:
            facts[stage] = values
            if stage == "finetune" and (scorecard := out / step / TEST_FILE).is_file():
                with readable(scorecard):
                    facts["test"] = _score(json.loads(scorecard.read_text()))
    if all(stage in facts for stage in runs):
        facts["total"] = {key: sum(facts[stage][key] for stage in runs) for key in ("epochs", "seconds")}
    return facts


def _score(record: _Facts) -> dict[str, Any]:
    """Return the accuracy, and the counts that it comes from."""
    return {"top1": record["top1"], "top1_correct": record["top1_correct"], "top1_images": record["images"]}


def _column(runs: Mapping[str, _Facts], stage: str, key: str) -> dict[str, Any]:
    """Return one fact of each run that has it, by seed."""
    values = {seed: facts.get(stage, {}).get(key) for seed, facts in runs.items()}
    return {seed: value for seed, value in values.items() if value is not None}
