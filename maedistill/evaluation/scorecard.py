"""A classifier's scorecard: accuracy on a set of shards and speed on this machine, on one process or many.

MODEL, SHARDS -> Network, ShardIndex -> one full pass -> lines on stdout, JSON, CSV files, a picture
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from maedistill.data.loading.evaluation import EvaluationImages
from maedistill.data.shards.index import ShardIndex, open_index
from maedistill.evaluation.accuracy import Evaluation, evaluate, write_predictions
from maedistill.evaluation.agreement import Agreement, TwoViews, evaluate_against
from maedistill.evaluation.calibration import BINS, calibrate
from maedistill.evaluation.context import EvalContext, finish, metadata, print_data, print_main, print_network
from maedistill.evaluation.full_pass import Predictor
from maedistill.evaluation.latency import measure_latency
from maedistill.evaluation.per_class import draw_confusions, worst_confusions, write_per_class
from maedistill.evaluation.real_labels import count_real, open_real_labels
from maedistill.processes import distributed
from maedistill.runs.records import unwritable
from maedistill.weights.class_names import compare_names, subset_columns
from maedistill.weights.from_run import Weights
from maedistill.weights.network import Network, open_network


def score(
    model: str,
    shards: str,
    context: EvalContext,
    *,
    index_file: str | None = None,
    weights: Weights = "model",
    image_size: int | None = None,
    crop: float | None = None,
    against: str | None = None,
    subset: bool = False,
    real: bool = False,
    bins: int = BINS,
    latency: bool = True,
    files: Mapping[str, Path | None],
) -> dict[str, Any]:
    """Evaluate `model` on `shards`, print the scorecard and return it. Collective.

    image_size, crop: override the model's own. against: a second classifier to compare with. subset: the shards hold
    only some of the model's classes, matched by name. real: also score against the labels of ImageNet-ReaL. bins:
    number of bins of the calibration error. files: paths for predictions, per_class, confusions and json. Raises
    subclasses of UserError.
    """
    network = distributed.main_first(lambda: open_network(model, "classifier", weights=weights, image_size=image_size))
    network = replace(network, crop=crop or network.crop)
    teacher = distributed.main_first(lambda: open_network(against, "classifier")) if against else None
    index = distributed.main_first(lambda: open_index(shards, index=index_file))
    print_network("model", network)
    if teacher is not None:
        print_network("vs.", teacher)
    print_data("data", index, shards)
    predictors = _open_predictors([network, teacher] if teacher else [network], index, context, subset=subset)
    real_labels = open_real_labels(index, num_classes=network.num_classes) if real else None

    evaluation, agreement = _evaluate(predictors, network, teacher, index, context)
    parts = {
        "result": evaluation.score,
        "calibration": calibrate(evaluation.confidences, evaluation.predictions[:, 0] == evaluation.labels, bins=bins),
        "real": count_real(evaluation, real_labels) if real else None,
        f"vs. {against}:": agreement,
    }
    result = metadata(network, context) | {"fingerprint": index.fingerprint()}
    for label, part in parts.items():
        if part is not None:
            print_main(label, part.line())
            result |= part.metrics()
    result |= {"vs": teacher.name} if teacher else {}
    result |= _time(network, context) if latency else {}
    distributed.on_main(lambda: _write(files, evaluation, network, index))
    return finish(result, files.get("json"))


def _open_predictors(
    networks: Sequence[Network], index: ShardIndex, context: EvalContext, *, subset: bool
) -> list[Predictor]:
    """Return predictors of the classes of the shards; print warnings about class names."""
    predictors = []
    for network in networks:
        columns, names = None, {"num_known": network.num_classes, "model": network.name}
        if subset:
            columns = subset_columns(network.classes, index.classes, **names)
            print_main("classes", f"{len(columns):,} of the {network.num_classes:,} of {network.name}, matched by name")
        else:
            for message in compare_names(network.classes, index.classes, **names):
                print_main("warning", message)
        predictors.append(Predictor.of(network, context, columns=columns))
    return predictors


def _evaluate(
    predictors: Sequence[Predictor], network: Network, teacher: Network | None, index: ShardIndex, context: EvalContext
) -> tuple[Evaluation, Agreement | None]:
    """Evaluate every image of the index, preprocessed as each network expects."""
    transform = TwoViews(network.transform(), teacher.transform()) if teacher else network.transform()
    images = EvaluationImages(index, torch.arange(len(index)), transform)
    if teacher is None:
        return evaluate(*predictors, images, context), None
    return evaluate_against(*predictors, images, context, sizes=(network.size, teacher.size))


def _time(network: Network, context: EvalContext) -> dict[str, float]:
    """Time the network on rank 0 and print the result."""
    speed = distributed.on_main(lambda: measure_latency(network.module, context, size=network.size))
    print_main(
        "speed",
        f"{speed['latency_ms']:.2f} ms for one image (median; 90 % within {speed['latency_p90_ms']:.2f} ms), "
        f"{speed['images_per_second']:.1f} images/s at batch {context.batch}, {context.precision} on "
        f"{context.device_name}",
    )
    return speed


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
        try:
            sheet.save(file, format="PNG")
        except OSError as error:
            raise unwritable(file, error) from error
