"""A classifier's scorecard: accuracy on a set of shards and speed on this machine, on one process or many.

MODEL, SHARDS -> Network, ShardIndex -> one full pass -> lines on stdout, JSON, CSV files, a picture
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maedistill.data.loading.evaluation import EvaluationImages
from maedistill.data.shards.index import ShardIndex, open_index
from maedistill.evaluation.accuracy import Evaluation, evaluate, write_predictions
from maedistill.evaluation.agreement import Agreement, TwoViews, evaluate_against, require_same_classes
from maedistill.evaluation.calibration import BINS, calibrate
from maedistill.evaluation.confusions import draw_confusions, worst_confusions
from maedistill.evaluation.latency import measure_latency
from maedistill.evaluation.per_class import write_per_class
from maedistill.evaluation.real_labels import open_real_labels
from maedistill.evaluation.setting import (
    EvalContext,
    describe_data,
    describe_input,
    facts_of,
    open_setting,
    say,
)
from maedistill.processes import distributed
from maedistill.runs.records import unwritable, write_text
from maedistill.weights.class_names import compare_names, subset_columns
from maedistill.weights.classifier import open_classifier
from maedistill.weights.from_run import Weights
from maedistill.weights.network import Network


@dataclass(frozen=True)
class _Job:
    """The networks and the shards of an evaluation.

    columns: the outputs of network and teacher that are the shards' classes; None for all outputs.
    """

    network: Network
    teacher: Network | None
    index: ShardIndex
    columns: tuple[Tensor | None, Tensor | None]

    @property
    def names(self) -> dict[int, str]:
        """Return the known class names, by label."""
        return dict(enumerate(self.index.classes or self.network.classes))


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
    against: str | None = None,
    subset: bool = False,
    real: bool = False,
    bins: int = BINS,
    latency: bool = True,
    files: Mapping[str, Path | None],
) -> dict[str, Any]:
    """Evaluate `model` on `shards`, print the scorecard and return it. Collective.

    image_size, crop: override the model's own. workers, threads: per process, by default its share of the cores.
    against: a second classifier to compare with. subset: the shards hold only some of the model's classes, matched by
    name. real: also score against the labels of ImageNet-ReaL. bins: number of bins of the calibration error. files:
    paths for predictions, per_class, confusions and json. Raises subclasses of UserError.
    """
    setting = open_setting(batch=batch, workers=workers, threads=threads, precision=precision)
    network = distributed.main_first(lambda: open_classifier(model, weights=weights, image_size=image_size))
    network = replace(network, crop=crop or network.crop)
    teacher = distributed.main_first(lambda: open_classifier(against)) if against else None
    index = distributed.main_first(lambda: open_index(shards, index=index_file))
    say(*_head(network, teacher, index, shards))
    subject = _Job(network, teacher, index, _columns(network, teacher, index, subset=subset))
    real_labels = open_real_labels(index, num_classes=network.num_classes) if real else None

    evaluation, agreement = _evaluate(subject, setting)
    calibration = calibrate(evaluation.confidences, evaluation.predictions[:, 0] == evaluation.labels, bins=bins)
    reassessed = real_labels.score(evaluation) if real_labels else None
    lines = [f"result   {evaluation.line()}", f"sure     {calibration.line()}"]
    lines += [f"real     {reassessed.line()}"] if reassessed else []
    lines += [f"against  {agreement.line()}"] if agreement else []
    say(*lines)
    scorecard = facts_of(network) | {"fingerprint": index.fingerprint()} | setting.facts
    scorecard |= evaluation.facts() | calibration.facts() | (reassessed.facts() if reassessed else {})
    scorecard |= {"against": teacher.name, **agreement.facts()} if agreement else {}
    scorecard |= _time(network, setting) if latency else {}
    distributed.on_main(lambda: _write(files, evaluation, subject, scorecard))
    distributed.barrier()  # a launcher ends the others when one rank exits, so all ranks exit together
    return scorecard


def _head(network: Network, teacher: Network | None, index: ShardIndex, shards: str) -> list[str]:
    """Describe the models, their input and the data, one line each."""
    lines = [f"model    {network.describe()}", f"input    {describe_input(network)}"]
    lines += [f"against  {teacher.describe()}", f"input    {describe_input(teacher)}"] if teacher else []
    return [*lines, f"data     {describe_data(index, shards)}"]


def _columns(
    network: Network, teacher: Network | None, index: ShardIndex, *, subset: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the outputs of both networks that are classes of the shards; print warnings about their class names."""
    found: list[Tensor | None] = [None, None]
    if teacher and not subset:
        require_same_classes(network.num_classes, teacher.num_classes)
    for i, one in enumerate(one for one in (network, teacher) if one):
        if subset:
            found[i] = subset_columns(one.classes, index.classes, num_known=one.num_classes, model=one.name)
            say(f"classes  {len(found[i]):,} of the {one.num_classes:,} of {one.name}, matched by name")
        else:
            say(*compare_names(one.classes, index.classes, num_known=one.num_classes, model=one.name))
    return found[0], found[1]


def _evaluate(subject: _Job, setting: EvalContext) -> tuple[Evaluation, Agreement | None]:
    """Evaluate every image of the index, preprocessed as each network expects."""
    network, teacher, (columns, teacher_columns) = subject.network, subject.teacher, subject.columns
    samples = torch.arange(len(subject.index))
    if teacher is None:
        images = EvaluationImages(subject.index, samples, network.transform())
        how = {"mean": network.mean, "std": network.std, "precision": setting.precision, "columns": columns}
        return evaluate(network.module.to(setting.device), images, **how, **setting.loop), None
    images = EvaluationImages(subject.index, samples, TwoViews(network.transform(), teacher.transform()))
    viewers = setting.view(network, columns=columns), setting.view(teacher, columns=teacher_columns)
    return evaluate_against(*viewers, images, sizes=(network.size, teacher.size), **setting.loop)


def _time(network: Network, setting: EvalContext) -> dict[str, float]:
    """Time the network on rank 0 and print the result."""
    how = {"batch": setting.batch, "device": setting.device, "precision": setting.precision}
    speed = distributed.on_main(lambda: measure_latency(network.module, size=network.size, **how))
    say(
        f"speed    {speed['latency_ms']:.2f} ms for one image (median; 90 % within {speed['latency_p90_ms']:.2f} ms), "
        f"{speed['images_per_second']:.1f} images/s at batch {setting.batch}, {setting.precision} on "
        f"{setting.device_name}"
    )
    return speed


def _write(files: Mapping[str, Path | None], evaluation: Evaluation, subject: _Job, scorecard: dict[str, Any]) -> None:
    """Write each file whose path is set."""
    if file := files.get("predictions"):
        write_predictions(file, evaluation, subject.index)
    if file := files.get("per_class"):
        write_per_class(file, evaluation, subject.names)
    if file := files.get("confusions"):
        images = EvaluationImages(subject.index, evaluation.ids, subject.network.transform())
        sheet = draw_confusions(worst_confusions(evaluation), images, subject.names)
        try:
            sheet.save(file, format="PNG")
        except OSError as error:
            raise unwritable(file, error) from error
    if file := files.get("json"):
        write_text(file, json.dumps(scorecard, indent=1) + "\n")
