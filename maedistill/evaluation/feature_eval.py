"""Evaluation of frozen features for the command line: kNN or a linear probe on any network, on one process or many.

MODEL, TRAIN, VAL -> Network with a `Backbone`, two ShardIndex -> features of both, once -> lines on stdout, JSON
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maedistill.data.shards.index import ShardIndex
from maedistill.errors import ConfigError, NumericsError
from maedistill.evaluation.features import Features, extract_features, open_pair
from maedistill.evaluation.knn import knn_counts
from maedistill.evaluation.linear_probe import OptimizerName, ProbeScore, batch_of, fit_heads, judge_heads
from maedistill.evaluation.setting import EvalContext, describe_data, describe_input, facts_of, open_setting, say
from maedistill.processes import distributed
from maedistill.runs.records import write_text
from maedistill.weights.backbone import Pool, open_backbone
from maedistill.weights.from_run import Weights
from maedistill.weights.network import Network


@dataclass(frozen=True)
class ProbeSpec:
    """Which features to evaluate, and the training and validation shards. crop: overrides the network's own."""

    model: str
    train: str
    val: str
    train_index: str | None = None
    val_index: str | None = None
    weights: Weights = "model"
    block: int | None = None
    pool: Pool = "mean"
    image_size: int | None = None
    crop: float | None = None


@dataclass(frozen=True)
class _Opened:
    """The network and the shards that a ProbeSpec names."""

    network: Network
    train: ShardIndex
    val: ShardIndex

    def facts(self) -> dict[str, Any]:
        """Return the entries for a result file."""
        backbone = self.network.module
        indexes = {"train": self.train, "val": self.val}
        prints = {f"{name}_fingerprint": index.fingerprint() for name, index in indexes.items()}
        return facts_of(self.network) | {"block": backbone.block, "pool": backbone.pool} | prints


def score_knn(
    question: ProbeSpec, *, ks: Sequence[int], temperature: float, file: Path | None, **settings: Any
) -> dict[str, Any]:
    """Print and return the accuracy of the vote of the k nearest training images, for each k. Collective.

    settings: as in `open_setting`. Raises subclasses of UserError.
    """
    setting = open_setting(**settings)
    opened = _open(question)
    if max(ks) > len(opened.train):
        raise ConfigError(
            f"--k {max(ks)} asks for more neighbours than the {len(opened.train):,} images of {question.train}",
            "name a smaller number, or more training shards",
        )
    bank, queries = _extract(opened, setting)
    features = (bank.rows, bank.labels, queries.rows, queries.labels)
    counts = knn_counts(*features, ks=ks, temperature=temperature, device=setting.device)
    images = len(queries.rows)
    for k, count in zip(ks, counts, strict=True):
        say(f"knn      k {k}: {_share(count, images)}")
    say("note     kNN is a poor judge of masked autoencoders: read it as a trend")
    scores = [{"k": k, "top1": count, "images": images} for k, count in zip(ks, counts, strict=True)]
    return _end(opened.facts() | setting.facts | {"temperature": temperature, "knn": scores}, file)


def score_probe(
    question: ProbeSpec,
    *,
    rates: Sequence[float],
    epochs: int,
    head_batch: int,
    optimizer: OptimizerName,
    file: Path | None,
    **settings: Any,
) -> dict[str, Any]:
    """Print and return the accuracy of a linear classifier on frozen features, for each learning rate. Collective.

    The learning rates are divided among the processes. settings: as in `open_setting`. Raises subclasses of UserError.
    """
    setting = open_setting(**settings)
    opened = _open(question)
    if len(opened.train) < 2:
        raise ConfigError(f"{question.train} holds one image", "name more training shards: BatchNorm needs two")
    train, val = _extract(opened, setting)
    how = {"epochs": epochs, "batch": batch_of(len(train.rows), head_batch), "optimizer": optimizer}
    classes = int(train.labels.max()) + 1
    say(f"probe    {optimizer}, {epochs} epochs, batch {how['batch']:,}, learning rates per 256 images")
    scores: list[ProbeScore] = []
    if mine := list(rates)[distributed.rank() :: distributed.world_size()]:
        heads = fit_heads(train.rows, train.labels, rates=mine, num_classes=classes, device=setting.device, **how)
        scores = judge_heads(heads, val.rows, val.labels)
    everything = sorted(itertools.chain(*distributed.gather_objects(scores)), key=lambda score: score.lr)
    best = _best(everything)
    for score in everything:
        say(f"lr {score.lr:<6g}{_words(score)}")
    chosen = f", chosen on the same images from {len(everything)} rates" if len(everything) > 1 else ""
    chosen += " (the largest: try larger ones, too)" if chosen and best == everything[-1] else ""
    say(f"result   {_words(best)}, at lr {best.lr:g}{chosen}")
    result = opened.facts() | setting.facts | {"probe": how, "rates": [score.facts() for score in everything]}
    return _end(result | best.facts(), file)


def _open(question: ProbeSpec) -> _Opened:
    """Open the network and the shards, and print a description of each."""
    network = distributed.main_first(
        lambda: open_backbone(
            question.model,
            weights=question.weights,
            image_size=question.image_size,
            block=question.block,
            pool=question.pool,
        )
    )
    network = replace(network, crop=question.crop or network.crop)
    train, val = open_pair(question.train, question.val, train_index=question.train_index, val_index=question.val_index)
    say(f"model    {network.describe()}", f"input    {describe_input(network)}")
    say(f"train    {describe_data(train, question.train)}", f"val      {describe_data(val, question.val)}")
    return _Opened(network, train, val)


def _extract(opened: _Opened, setting: EvalContext) -> tuple[Features, Features]:
    """Return the features of the training and of the validation images, and print which features they are."""
    train, val = (extract_features(opened.network, index, setting) for index in (opened.train, opened.val))
    say(f"features {opened.network.module.describe()}, {train.rows.shape[1]} wide")
    return train, val


def _best(scores: Sequence[ProbeScore]) -> ProbeScore:
    """Return the score with the best top-1; ties go to the smaller rate. Raises NumericsError if all diverged."""
    sane = [score for score in scores if score.is_finite]
    if not sane:
        raise NumericsError("the probe diverged at every learning rate", "name smaller ones with --lr")
    return max(sane, key=lambda score: (score.top1, -score.lr))


def _words(score: ProbeScore) -> str:
    if not score.is_finite:
        return "diverged"
    top1, top5 = (_share(count, score.images) for count in (score.top1, score.top5))
    return f"top-1 {top1}, top-5 {top5}, loss {score.loss:.4f}"


def _share(count: int, images: int) -> str:
    return f"{100 * count / images:.2f} % ({count} of {images})"


def _end(result: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """Write the result and wait for all ranks, because a launcher ends the others when one rank exits."""
    if file:
        distributed.on_main(lambda: write_text(file, json.dumps(result, indent=1) + "\n"))
    distributed.barrier()
    return result
