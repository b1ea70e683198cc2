"""Exits of a run: each alone, all together, and one that depends on the image, accuracy against mean latency.

RUN with exits, SHARDS -> one pass of all exits -> lines on stdout, JSON, a picture

An image leaves at the first exit that is confident enough: whose largest probability reaches a threshold, or at the
end. Its cost is that of the network which ends there; the heads of the exits before it are not counted. The latencies
of all of them are measured in turn, pass by pass.

n images   b batch   E exits, the end included   C classes
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from maedistill.config.sources import NETWORK_KINDS, named_source, why_unnamed
from maedistill.data.loading.evaluation import EvaluationImages
from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.patterns import describe_shards
from maedistill.errors import ConfigError
from maedistill.evaluation.accuracy import best_classes, evaluate, evaluate_with
from maedistill.evaluation.context import EvalContext, finish, metadata, print_data, print_main, print_network
from maedistill.evaluation.full_pass import Predictor
from maedistill.evaluation.latency import image_seconds
from maedistill.models.flops import forward_gflop
from maedistill.processes import distributed
from maedistill.report.charts import new_canvas, plain
from maedistill.report.formatting import percent, short_names
from maedistill.report.intervals import of_count
from maedistill.runs.folder import RunFolder
from maedistill.runs.records import write_errors
from maedistill.weights.class_names import compare_names
from maedistill.weights.from_run import run_members, validated_metadata
from maedistill.weights.network import Network
from maedistill.weights.open_network import open_network

_THRESHOLDS = 21  # points of the curve: quantiles of the confidences


@dataclass(frozen=True)
class Ending:
    """A network that ends at an exit, a whole one, or another one for comparison: its size, cost and accuracy."""

    name: str  # "exit 5", "end", or of another network
    parameters: int
    gflop: float
    latency_ms: float
    top1_correct: int
    images: int


@dataclass(frozen=True)
class Operation:
    """A threshold on the confidence: what share of the images it classifies correctly, at which mean cost.

    shares: of the images that leave at each exit and at the end.
    """

    threshold: float
    top1: float
    latency_ms: float
    gflop: float
    shares: tuple[float, ...]


def score_exits(
    source: str,
    shards: str,
    context: EvalContext,
    *,
    weights: str = "model",
    index_file: str | None = None,
    beside: Sequence[str] = (),
    picture: Path | None = None,
    file: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a run's exits on `shards`, print and return the result. Collective.

    beside: other networks, such as separately trained sizes, which are evaluated and drawn too. picture, file: for the
    curve as PNG and the result as JSON. Each run sees photographs turned as in its training; members of samples are
    those of `source`. Raises subclasses of UserError.
    """
    exits, networks = distributed.main_first(lambda: _open_all(source, weights))
    others = [distributed.main_first(partial(open_network, one, "classifier")) for one in beside]
    network = networks[-1]
    if unlike := [one.name for one in others if one.num_classes != network.num_classes]:
        cause = f"{unlike[0]} does not have the {network.num_classes:,} classes of {network.name}"
        raise ConfigError(f"--beside: {cause}", "name networks of the same classes")
    members = run_members(named_source(source).partition(":")[2])
    index = distributed.main_first(lambda: open_index(shards, index=index_file, split="val", members=members))
    print_network("model", network)
    print_data("data", index, describe_shards(shards, index.shards))
    given, whose = (index.classes, "the shards") if index.classes else (network.classes, network.name)
    for one in (network, *others):
        for message in compare_names(one.classes, given, num_known=one.num_classes, model=one.name, other=whose):
            print_main("warning", message)
    each = [*networks, *others]
    measured = _measure(networks, others, index, context)
    times = distributed.on_main(lambda: image_seconds([(one.module, one.size) for one in each], context))
    names = [*(f"exit {block}" for block in exits), "end", *beside]
    endings = [
        Ending(name, one.parameters, forward_gflop(one.module), 1e3 * median(passes), *counted)
        for name, one, passes, counted in zip(names, each, times, measured.counts, strict=True)
    ]
    curve = operations(measured.correct, measured.confidences, endings[: len(networks)])
    _print(endings, curve, ensemble=measured.ensemble, images=len(measured.correct))
    result = metadata(network, context) | {"fingerprint": index.fingerprint()}
    result |= {"exits": [asdict(one) for one in endings], "ensemble_top1_correct": measured.ensemble}
    result |= {"images": len(measured.correct), "bad_images": measured.bad_images}
    result |= {"curve": [asdict(point) for point in curve]}
    if picture is not None and distributed.on_main(lambda: draw_exits(endings, curve, picture)) is None:
        print_main("note", "no picture: matplotlib is not installed (pip install matplotlib)")
    return finish(result, file)


@dataclass(frozen=True)
class _Measured:
    """What all images give. counts: right ones and all, of each network; ensemble: right ones of the mean logits."""

    counts: list[tuple[int, int]]
    correct: Tensor  # of the exits and the end, bool [n, E]
    confidences: Tensor  # their largest probabilities, [n, E]
    ensemble: int
    bad_images: int


def _measure(
    networks: Sequence[Network], others: Sequence[Network], index: ShardIndex, context: EvalContext
) -> _Measured:
    """Classify every image once by all exits and the end together, then by each of the others. Collective."""
    predictors = [Predictor(one.module, context, mean=one.mean, std=one.std) for one in networks]

    def classify(pixels: Tensor) -> tuple[Tensor, ...]:
        each = torch.stack([predictor(pixels) for predictor in predictors], dim=1)  # [b, E, C]
        best = torch.stack([best_classes(each[:, i])[:, 0] for i in range(len(networks))], dim=1)  # [b, E]
        return each[:, -1], best, each.softmax(-1).amax(-1), best_classes(each.mean(1))[:, 0]

    def images_of(one: Network) -> EvaluationImages:
        own = replace(index, apply_exif=one.exif == "apply")  # as in training
        return EvaluationImages(own, torch.arange(len(index)), one.transform())

    evaluation, (best, confidences, together) = evaluate_with(
        classify, [one.module for one in networks], images_of(networks[-1]), context
    )
    correct = best == evaluation.labels[:, None]  # [n, E]
    counts = [(int(right), len(correct)) for right in correct.sum(0).tolist()]
    for other in others:
        predictor = Predictor(other.module, context, mean=other.mean, std=other.std)
        score = evaluate(predictor, images_of(other), context).score
        counts.append((score.top1_correct, score.images))
    ensemble = int((together == evaluation.labels).sum())
    return _Measured(counts, correct, confidences, ensemble, len(evaluation.bad_ids))


def _print(endings: Sequence[Ending], curve: Sequence[Operation], *, ensemble: int, images: int) -> None:
    """Print a line for each network and for the ensemble, and some thresholds."""
    for ending in endings:
        cost = f"{ending.parameters / 1e6:.2f} M, {ending.gflop:.3g} GFLOP, {ending.latency_ms:.2f} ms"
        print_main(ending.name, f"top-1 {percent(ending.top1_correct, ending.images)}, {cost}")
    print_main("ensemble", f"top-1 {percent(ensemble, images)}, mean logits of all")
    for point in curve[:: max(1, len(curve) // 5)]:
        print_main(
            "threshold", f"{point.threshold:.3f}: top-1 {100 * point.top1:.2f} %, mean {point.latency_ms:.2f} ms"
        )


def operations(correct: Tensor, confidences: Tensor, endings: Sequence[Ending]) -> list[Operation]:
    """Return the curve, from the first exit for all images to the end for all. correct, confidences: [n, E]."""
    early = confidences[:, :-1].double()  # [n, E - 1]; whoever has not left yet leaves at the end
    quantiles = torch.linspace(0, 1, _THRESHOLDS, dtype=torch.float64)
    thresholds = [0.0, *early.flatten().quantile(quantiles).unique().tolist(), 1.0 + 1e-6]
    latency, gflop = (torch.tensor([getattr(one, name) for one in endings]) for name in ("latency_ms", "gflop"))
    curve = []
    for threshold in thresholds:
        leaves = torch.cat([early >= threshold, torch.ones(len(early), 1, dtype=torch.bool)], dim=1)  # [n, E]
        place = leaves.int().argmax(dim=1)  # [n], the first that is true
        right = correct.gather(1, place[:, None]).double().mean()
        shares = torch.bincount(place, minlength=len(endings)) / len(place)
        costs = float((shares * latency).sum()), float((shares * gflop).sum())
        curve.append(Operation(threshold, float(right), *costs, tuple(shares.tolist())))
    return curve


def draw_exits(endings: Sequence[Ending], curve: Sequence[Operation], path: Path) -> Path | None:
    """Draw top-1 over mean latency: each exit alone, with its 95 % interval, and the curve of thresholds.

    Returns None without matplotlib.
    """
    canvas = new_canvas(figsize=(7.2, 4.2 + 0.2 * len(endings)))
    if canvas is None:
        return None
    axes = canvas.figure.add_subplot(xlabel="mean latency of one image, ms", ylabel="top-1, %")
    points = [(one.latency_ms, 100 * one.top1) for one in curve]
    axes.plot(*zip(*points, strict=True), marker=".", label="an exit for each image, by its confidence")
    for name, one in zip(short_names([one.name for one in endings]), endings, strict=True):
        top1, interval = 100 * one.top1_correct / one.images, of_count(one.top1_correct, one.images)
        spread = [[top1 - 100 * interval.low], [100 * interval.high - top1]]
        label = plain(f"{name[-60:]}: {top1:.1f} %, {one.parameters / 1e6:.2f} M")
        axes.errorbar(one.latency_ms, top1, yerr=spread, fmt="o", capsize=3, zorder=3, label=label)
    axes.grid(alpha=0.3)
    axes.set_xlim(left=0)
    canvas.figure.legend(loc="outside lower left")  # names of other networks may be long
    with write_errors(path):
        canvas.print_png(path)
    return path


def _open_all(source: str, weights: str) -> tuple[list[int], list[Network]]:
    """Return the exits of a run, and its network at each of them, then whole."""
    kind, _, path = (named := named_source(source)).partition(":")
    if problem := why_unnamed(named, (*NETWORK_KINDS, "file")):
        raise ConfigError(*problem)
    exits = validated_metadata(RunFolder(path)).get("exits", []) if kind == "run" else []
    if not exits:
        raise ConfigError(f"{source} has no exits", "name a run that was fine-tuned with student.exits")
    return exits, [open_network(source, "classifier", weights=weights, exit=block) for block in (*exits, None)]
