"""The results of a study, read from its run folders: facts of each run, statistics over seeds.

    OUT/NAME/seed_K/{pretrain,finetune}/{config.yaml,*.json,metrics.jsonl} -> collect -> the content of results.json

Only the progress of unfinished runs is reported, not their results. Accuracies are in [0, 1], times in seconds.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from maedistill.config.finetune import FinetuneConfig
from maedistill.report.run_report import summary
from maedistill.runs.folder import RunFolder
from maedistill.runs.metrics import read_metrics
from maedistill.study.finished import is_finished, last_end
from maedistill.study.placeholders import finetune_step, pretrain_step
from maedistill.study.plan import TEST_FILE
from maedistill.study.rows import all_rows
from maedistill.study.schema import TEACHER_SEED, Study

_Facts = Mapping[str, Any]
_MEASURES = {
    "test_accuracy": ("test", "accuracy"),
    "pixels": ("pretrain", "pixels"),
    "knn": ("pretrain", "knn"),
    "pretrain_seconds": ("pretrain", "seconds"),
    "finetune_seconds": ("finetune", "seconds"),
}
_SIZES = {
    "pretrain_epochs": ("pretrain", "epochs"),
    "pretrain_images": ("pretrain", "images"),
    "pixel_target": ("pretrain", "target"),
    "finetune_epochs": ("finetune", "epochs"),
    "finetune_images": ("finetune", "images"),
}


def collect(study: Study, out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Return {"baseline": name, "networks": {name: {"runs": {seed: facts}, "summary": ...}}, "unfinished": [...]}.

    Teachers come first. The facts of a seed are {"pretrain": ..., "finetune": ..., "test": ...}, without the entries
    whose result does not exist (yet).
    """
    steps = _steps_of(study, seeds)
    runs = {name: {str(k): _facts_of(out, *pair) for k, pair in of.items()} for name, of in steps.items()}
    compared = {name for name, _ in all_rows(study.students)} - {study.baseline}
    baseline = runs.get(study.baseline, {})
    networks = {
        name: {"runs": of, "summary": summarize(of, baseline if name in compared else {})} for name, of in runs.items()
    }
    everything = dict.fromkeys(step for of in steps.values() for pair in of.values() for step in pair if step)
    return {"baseline": study.baseline, "networks": networks, "unfinished": _unfinished(out, everything)}


def summarize(runs: Mapping[str, _Facts], baseline: Mapping[str, _Facts]) -> dict[str, Any]:
    """Return statistics of a network over its seeds, and of its differences to the baseline's runs of the same seeds.

    Sizes are taken from the first seed, because all seeds have the same settings.
    """
    each, before = _column(runs, "finetune", "accuracy"), _column(baseline, "finetune", "accuracy")
    sizes = {name: next(iter(_column(runs, *key).values()), None) for name, key in _SIZES.items()}
    networks = _column(runs, "finetune", "parameters") or _column(runs, "pretrain", "parameters")
    return {
        "each": each,
        "accuracy": statistics(each.values()),
        "difference": statistics(value - before[seed] for seed, value in each.items() if seed in before),
        **{name: statistics(_column(runs, *key).values()) for name, key in _MEASURES.items()},
        **sizes,
        "parameters": next(iter(networks.values()), None),
    }


def statistics(values: Iterable[float]) -> dict[str, float | int | None]:
    """Return n, mean and sample standard deviation (n - 1); None for either if there are too few values."""
    values = list(values)
    n = len(values)
    mean = math.fsum(values) / n if n else None
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    return {"n": n, "mean": mean, "sd": spread}


def run_facts(folder: RunFolder) -> dict[str, Any] | None:
    """Return the settings and the results of a finished run; None for a run that is not finished."""
    if not is_finished(folder):
        return None
    config, facts, records = folder.load_config(), folder.facts(), read_metrics(folder.path)
    last = summary(records)
    found = {
        "folder": str(folder.path),
        "command": facts["starts"][-1]["command"],
        "epochs": config.optim.epochs,
        "images": facts["data"]["images"],
        "seconds": last["seconds"],
        "images_per_second": last["rate"],
        "parameters": parameters_of(facts["network"]),
    }
    if isinstance(config, FinetuneConfig):
        score = [record for record in records if "top1" in record][-1]
        return found | _score(score) | {"start": facts["init"]}
    return found | {"method": config.method, "target": config.pixels.target} | {k: last[k] for k in ("pixels", "knn")}


def parameters_of(network: Mapping[str, Any]) -> int:
    """Count the parameters of a network that run.json describes."""
    with torch.device("meta"):
        vit = timm.create_model(network["name"], pretrained=False, **network["arguments"])
    return sum(parameter.numel() for parameter in vit.parameters())


def _steps_of(study: Study, seeds: Sequence[int]) -> dict[str, dict[int, tuple[str | None, str | None]]]:
    """Return the names of each network's pre-training and fine-tuning step by seed, None for a missing one."""

    def pair(pretrained: str | None, finetuned: str | None, seed: int) -> tuple[str | None, str | None]:
        return (
            pretrain_step(pretrained, seed) if pretrained is not None else None,
            finetune_step(finetuned, seed) if finetuned is not None else None,
        )

    teachers = {
        name: {TEACHER_SEED: pair(teacher.pretraining_of or name, name if teacher.finetune else None, TEACHER_SEED)}
        for name, teacher in study.teachers.items()
    }
    rows = {name: {seed: pair(row.pretraining, name, seed) for seed in seeds} for name, row in all_rows(study.students)}
    return teachers | rows


def _facts_of(out: Path, pretrain: str | None, finetune: str | None) -> dict[str, Any]:
    steps = {"pretrain": pretrain, "finetune": finetune}
    found = {stage: run_facts(RunFolder(out / step)) for stage, step in steps.items() if step is not None}
    if found.get("finetune") and (out / finetune / TEST_FILE).is_file():
        found["test"] = _score(json.loads((out / finetune / TEST_FILE).read_text()))
    return {stage: facts for stage, facts in found.items() if facts is not None}


def _score(record: _Facts) -> dict[str, Any]:
    """Return the counts of correct images, and the accuracy."""
    return {"accuracy": record["top1"] / record["images"], "top1": record["top1"], "of": record["images"]}


def _column(runs: Mapping[str, _Facts], stage: str, key: str) -> dict[str, Any]:
    """Return one fact of each run that has it, by seed."""
    found = {seed: facts.get(stage, {}).get(key) for seed, facts in runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def _unfinished(out: Path, steps: Iterable[str]) -> list[dict[str, Any]]:
    """Return for each unfinished run how many epochs it has trained, and why its last start ended, if known."""
    found = []
    for step in steps:
        if not is_finished(folder := RunFolder(out / step)):
            epochs = max((record["epoch"] for record in read_metrics(folder.path)), default=0.0)
            found.append({"run": step, "epochs": epochs, "ended": last_end(folder)})
    return found
