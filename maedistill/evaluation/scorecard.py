"""A classifier's scorecard: how often it is right on a set of shards and how fast it is here. One process or many.

MODEL, SHARDS -> Classifier, ShardIndex -> evaluate, measure_latency -> lines on stdout, predictions.csv, a JSON file
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from maedistill.data.evaluation import EvaluationImages, evaluation_transform
from maedistill.data.index import ShardIndex, open_index
from maedistill.errors import DataError
from maedistill.evaluation.accuracy import Evaluation, evaluate, write_predictions
from maedistill.evaluation.latency import measure_latency
from maedistill.machine import cpu_share
from maedistill.machine import precision as resolve_precision
from maedistill.models.classifier import Classifier, open_classifier
from maedistill.models.saved import Weights
from maedistill.training import distributed
from maedistill.training.records import write_text

_PATIENCE = 1800  # seconds that a rank waits for the others: their shares are equal, their machines may not be


def score(
    model: str,
    shards: str,
    *,
    index_file: str | None = None,
    weights: Weights = "model",
    image_size: int | None = None,
    crop: float | None = None,
    batch: int = 64,
    workers: int | None = None,
    threads: int | None = None,
    precision: str = "auto",
    latency: bool = True,
    predictions_file: Path | None = None,
    json_file: Path | None = None,
) -> dict[str, Any]:
    """Evaluates `model` on `shards`, prints the scorecard and returns it. Every process of the run calls it.

    image_size, crop: other than the model's own. workers, threads: of each process, by default its share of the cores.
    Raises kinds of UserError.
    """
    distributed.open_group(_PATIENCE)
    device, cores = distributed.device(), cpu_share(distributed.local_world_size())
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or cores)
    setting = {"device": device, "batch": batch, "precision": resolve_precision(precision, device)}
    classifier = distributed.main_first(lambda: open_classifier(model, weights=weights, image_size=image_size))
    classifier = replace(classifier, network=classifier.network.to(device), crop=crop or classifier.crop)
    index = distributed.main_first(lambda: open_index(shards, index=index_file))
    _say(*_head(classifier, index, shards))

    evaluation = _evaluate(classifier, index, workers=min(8, cores) if workers is None else workers, **setting)
    _say(f"result   {evaluation.line()}")
    speed: dict[str, float] = {}
    if latency:
        speed = distributed.on_main(lambda: measure_latency(classifier.network, size=classifier.size, **setting))
        _say(f"speed    {_speed_line(speed, **setting)}")
    scorecard = _facts(classifier, index) | setting | {"device": _device_name(device)}
    scorecard |= {name: getattr(evaluation, name) for name in ("images", "top1", "top5", "loss")} | speed
    if distributed.is_main() and predictions_file:
        write_predictions(predictions_file, evaluation, index)
    if distributed.is_main() and json_file:
        write_text(json_file, json.dumps(scorecard, indent=1) + "\n")
    distributed.barrier()  # a launcher ends the others when one rank is gone: nobody leaves before all are done
    return scorecard


def _evaluate(classifier: Classifier, index: ShardIndex, **keywords: Any) -> Evaluation:
    """Every image of the index, prepared as the classifier wants it."""
    transform = evaluation_transform(
        size=classifier.size,
        crop=classifier.crop,
        interpolation=classifier.interpolation,
        crop_mode=classifier.crop_mode,
        mean=classifier.mean,
    )
    images = EvaluationImages(index, torch.arange(len(index)), transform)
    return evaluate(classifier.network, images, mean=classifier.mean, std=classifier.std, **keywords)


def _facts(classifier: Classifier, index: ShardIndex) -> dict[str, Any]:
    """What was evaluated, on what."""
    return {
        "model": classifier.name,
        "licence": classifier.licence,
        "parameters": classifier.parameters,
        "classes": classifier.num_classes,
        "size": classifier.size,
        "crop": classifier.crop,
        "interpolation": classifier.interpolation,
        "crop_mode": classifier.crop_mode,
        "mean": classifier.mean,
        "std": classifier.std,
        "fingerprint": index.fingerprint(),
    }


def _head(classifier: Classifier, index: ShardIndex, shards: str) -> list[str]:
    """Model, input and data in words."""
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (classifier.mean, classifier.std))
    how = f"{classifier.crop_mode} crop {classifier.crop:g}, {classifier.interpolation}"
    samples = f"{len(index):,} images, {index.num_classes:,} classes, fingerprint {index.fingerprint()[:12]}"
    return [
        f"model    {classifier.describe()}",
        f"input    {classifier.size} px, {how}, mean {mean}, std {std}",
        f"data     {samples}, {shards}",
        *_compare_names(classifier.classes, index.classes, num_known=classifier.num_classes),
    ]


def _compare_names(known: tuple[str, ...], given: tuple[str, ...], *, num_known: int) -> list[str]:
    """A warning where model (`known`) and shards (`given`) have other classes; both names may be empty: not known.

    Raises DataError where they have the same names in another order: every count would be wrong.
    """
    if given and not known and num_known != len(given):
        numbers = f"the model has {num_known:,} classes without names, the shards {len(given):,}"
        return [f"warning  {numbers}: are they the same ones?"]
    if not known or not given or known == given:
        return []
    label = next((i for i, names in enumerate(zip(known, given, strict=False)) if names[0] != names[1]), None)
    if label is None:  # one has more classes than the other, the first ones are the same
        return []
    if sorted(known) == sorted(given):
        raise DataError(
            f"model and shards number their classes differently: label {label} is {known[label]!r} to the model and "
            f"{given[label]!r} in the shards",
            "write the shards again with the classes in the model's order",
        )
    return [f"warning  the model names its classes otherwise: label {label} is {known[label]!r}, not {given[label]!r}"]


def _speed_line(speed: dict[str, float], *, device: torch.device, batch: int, precision: str) -> str:
    return (
        f"{speed['latency_ms']:.2f} ms for one image (median; 90 % within {speed['latency_p90_ms']:.2f} ms), "
        f"{speed['images_per_second']:.1f} images/s at batch {batch}, {precision} on {_device_name(device)}"
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _say(*lines: str) -> None:
    if distributed.is_main() and lines:
        print("\n".join(lines), flush=True)
