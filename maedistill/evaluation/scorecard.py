"""A classifier's scorecard: accuracy on a set of shards and speed on this machine, on one process or many.

MODEL, SHARDS -> Network, ShardIndex -> one full pass -> lines on stdout, JSON, CSV files, a picture
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maedistill.data.loading.dataset import ImageDataset, open_dataset
from maedistill.data.loading.evaluation import EvaluationImages
from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.patterns import describe_shards
from maedistill.data.shards.scan import USUAL, Members
from maedistill.errors import ConfigError
from maedistill.evaluation.accuracy import Evaluation, TopCounts, evaluate, write_predictions
from maedistill.evaluation.agreement import Agreement, TwoViews, evaluate_against
from maedistill.evaluation.calibration import Calibration, calibrate
from maedistill.evaluation.context import (
    EvalContext,
    computing,
    finish,
    metadata,
    print_data,
    print_main,
    print_network,
)
from maedistill.evaluation.full_pass import Predictor
from maedistill.evaluation.latency import measure_latency
from maedistill.evaluation.per_class import draw_confusions, worst_confusions, write_per_class
from maedistill.evaluation.real_labels import count_real, open_real_labels
from maedistill.processes import distributed
from maedistill.runs.objects import class_name, python_name
from maedistill.runs.records import write_errors
from maedistill.weights.class_names import compare_names, subset_columns
from maedistill.weights.network import Network
from maedistill.weights.open_network import given_network, open_network


@dataclass(frozen=True)
class ScoreSpec:
    """Which classifier to evaluate on which images, and how.

    From Python the model may be a module that gives logits, and the shards a data set.
    """

    model: str | nn.Module
    shards: str | ImageDataset
    index: str | None = None  # the shards' index file, where it does not lie beside them
    weights: str = "model"
    exit: int | None = None  # of a run with exits: the block where the network ends
    peer: int = 0  # of a run of mutual learning: the number of the student
    image_size: int | None = None  # this and `crop` override the model's own
    crop: float | None = None
    test_size: bool = False  # take size and crop of its published accuracy, if timm states others
    members: Members = USUAL  # which fields of a sample are image and label
    exif: str | None = None  # `apply` or `ignore`, if not as in training
    against: str | Network | None = None  # a second classifier to compare with, or its name
    subset: bool = False  # the shards hold only some of the model's classes, matched by name
    real: bool = False  # score against the labels of ImageNet-ReaL, too
    latency: bool = True  # time the network


def score(spec: ScoreSpec, context: EvalContext, *, files: Mapping[str, Path | None]) -> dict[str, Any]:
    """Evaluate a classifier, print the scorecard and return it. Collective.

    files: paths for predictions, per_class, confusions and json. Raises subclasses of UserError.
    """
    network, shards, against = _open_model(spec), spec.shards, spec.against
    teacher: Network | None
    if isinstance(against, str):
        teacher, rival_name = distributed.main_first(partial(open_network, against, "predictor")), against
    else:
        teacher, rival_name = against, against.name if against else ""
    _require_fp32(context, [network, *([teacher] if teacher else [])])
    if isinstance(shards, str):
        open_images = partial(open_index, members=spec.members, apply_exif=(spec.exif or network.exif) == "apply")
        index = distributed.main_first(lambda: open_images(shards, index=spec.index, split="val"))
        place = describe_shards(shards, index.shards)
    else:
        place = class_name(shards)
        index = open_dataset(shards, place)
    print_network("model", network)
    if teacher is not None:
        print_network("vs.", teacher)
    print_data("data", index, place)
    predictor = _open_predictor(network, index, context, subset=spec.subset)
    rival = _open_predictor(teacher, index, context, subset=spec.subset) if teacher is not None else None
    real_labels = open_real_labels(index, num_classes=network.num_classes) if spec.real else None

    samples, agreement = torch.arange(len(index)), None
    if teacher is None or rival is None:
        evaluation = evaluate(predictor, EvaluationImages(index, samples, network.transform()), context)
    else:
        images = EvaluationImages(index, samples, TwoViews(network.transform(), teacher.transform()))
        sizes = network.size, teacher.size
        evaluation, agreement = evaluate_against(predictor, rival, images, context, sizes=sizes)
    parts: dict[str, TopCounts | Calibration | Agreement | None] = {
        "result": evaluation.score,
        "calibration": calibrate(evaluation.confidences, evaluation.predictions[:, 0] == evaluation.labels),
        "real": count_real(evaluation, real_labels) if real_labels is not None else None,
        f"vs. {rival_name}:": agreement,
    }
    result = metadata(network, context) | {"fingerprint": index.fingerprint()}
    for label, part in parts.items():
        if part is not None:
            print_main(label, part.line())
            result |= part.metrics()
    result |= {"vs": teacher.name} if teacher else {}
    if spec.latency:
        there = computing(network, context)
        speed = distributed.on_main(lambda: measure_latency(network.module, there, size=network.size))
        times = f"{speed['latency_ms']:.2f} ms for one image (median; 90 % within {speed['latency_p90_ms']:.2f} ms)"
        rate = f"{speed['images_per_second']:.1f} images/s at batch {context.batch}"
        precision = network.precision or context.precision
        print_main("speed", f"{times}, {rate}, {precision} on {there.device_name}")
        result |= speed
    distributed.on_main(lambda: _write(files, evaluation, network, index))
    return finish(result, files.get("json"))


def _open_model(spec: ScoreSpec) -> Network:
    """Open the model with the image size and the crop that it is evaluated with. Collective."""

    def open_sized(size: int | None) -> Network:
        if isinstance(spec.model, str):
            part: dict[str, Any] = {"weights": spec.weights, "exit": spec.exit, "peer": spec.peer}
            return open_network(spec.model, "predictor", **part, image_size=size)
        given = given_network(spec.model, python_name(spec.model), image_size=size)
        given.module.float()  # the context's precision says in what it computes
        return replace(given, num_classes=given.output().shape[-1])

    network, crop = distributed.main_first(lambda: open_sized(spec.image_size)), spec.crop
    if spec.test_size:
        size, crop = network.test_size, crop or network.test_crop
        if spec.image_size is not None:
            raise ConfigError("--test-size and --image-size both name the size", "leave one of them out")
        if size is None:
            raise ConfigError(
                f"--test-size: {network.name} states no other size for its accuracy",
                "leave it out, or name one with --image-size",
            )
        network = distributed.main_first(lambda: open_sized(size))
    return replace(network, crop=crop or network.crop)


def _require_fp32(context: EvalContext, networks: Sequence[Network]) -> None:
    """Raise ConfigError if another precision is asked for than that in which a graph computes."""
    for network in networks:
        if network.precision and context.precision != "fp32":
            raise ConfigError(
                f"{network.name} is a graph in {network.precision}, which does not compute in {context.precision}",
                "use --precision fp32: the graph keeps its own format",
            )


def _open_predictor(network: Network, index: ShardIndex, context: EvalContext, *, subset: bool) -> Predictor:
    """Return a predictor of the classes of the shards; print warnings about class names."""
    known, num_known, columns = network.classes, network.num_classes, None
    if subset:
        columns = subset_columns(known, index.classes, num_known=num_known, model=network.name)
        print_main("classes", f"{len(columns):,} of the {num_known:,} of {network.name}, matched by name")
    else:
        for message in compare_names(known, index.classes, num_known=num_known, model=network.name):
            print_main("warning", message)
    return Predictor(network.module, context, mean=network.mean, std=network.std, columns=columns)


def _write(files: Mapping[str, Path | None], evaluation: Evaluation, network: Network, index: ShardIndex) -> None:
    """Write the tables and the picture whose paths are set."""
    names = dict(enumerate(index.classes or network.classes))
    if file := files.get("predictions"):
        write_predictions(file, evaluation, index)
    if file := files.get("per_class"):
        write_per_class(file, evaluation, names)
    if file := files.get("confusions"):
        images = EvaluationImages(index, evaluation.ids, network.transform())
        sheet = draw_confusions(worst_confusions(evaluation), images, names)
        with write_errors(file):
            sheet.save(file, format="PNG")
