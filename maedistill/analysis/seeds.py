"""Networks that differ only in the seed of their training, taken together.

    labels/seed_0/finetune, labels/seed_1/finetune, ... -> labels/seed_*/finetune, with 95 % intervals over seeds

Intervals over images say what other images would change, these what other seeds would change.
"""

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from maedistill.analysis.concepts import COURSE_METRICS, METRICS
from maedistill.report import intervals

Summary = Mapping[str, Any]  # of `concepts.summarize`
SEED_FOLDER = re.compile(r"(?<![^/:])seed_(\d+)(?![^/])")


def group_seeds(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the networks of each group, by seed: those whose names differ only in a folder `seed_N`, at least two."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        if len(found := SEED_FOLDER.findall(name)) == 1:
            groups.setdefault(SEED_FOLDER.sub("seed_*", name), {})[found[0]] = name
    return {group: seeds for group, seeds in groups.items() if len(seeds) > 1}


def over_seeds(networks: Mapping[str, Summary]) -> dict[str, dict[str, Any]]:
    """Return the summary of each group: metrics with intervals over seeds, and their difference to the first group.

    If all its seeds keep the same steps, a group has means of each checkpoint, and the metrics that depend on them.
    There is no difference between groups that share fewer than two seeds.
    """
    groups, found = group_seeds([*networks]), dict[str, dict[str, Any]]()
    first = next(iter(groups.values()), {})
    for name, seeds in groups.items():
        members = [networks[one] for one in seeds.values()]
        metrics = [one["metrics"] for one in members]
        means = {kind: _over([one[kind] for one in metrics]) for kind in _kinds(members)}
        found[name] = {"seeds": [*seeds], "metrics": means}
        if _keep_same_steps(members):
            states = zip(*(one["checkpoints"] for one in members), strict=True)
            found[name]["checkpoints"] = [_mean_state(one) for one in states]
        shared = [seed for seed in seeds if seed in first]
        if seeds is not first and len(shared) > 1:
            pairs = [(networks[seeds[seed]], networks[first[seed]]) for seed in shared]
            found[name]["difference"] = {"to": next(iter(groups)), "metrics": _differences(pairs)}
    return found


def _kinds(networks: Sequence[Summary]) -> list[str]:
    """Return the metrics that all networks have and that compare: some do between the same steps only."""
    kinds = [kind for kind in METRICS if all(kind in one["metrics"] for one in networks)]
    return kinds if _keep_same_steps(networks) else [kind for kind in kinds if kind not in COURSE_METRICS]


def _differences(pairs: Sequence[tuple[Summary, Summary]]) -> dict[str, dict[str, Any]]:
    """Return the mean of the differences of each metric, seed by seed, with its interval."""
    kinds = _kinds([one for pair in pairs for one in pair])
    metrics = [(one["metrics"], other["metrics"]) for one, other in pairs]
    return {kind: _over([one[kind] for one, _ in metrics], [other[kind] for _, other in metrics]) for kind in kinds}


def _over(ones: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Return the mean over the seeds in which a metric, or its difference to another, is a number; and its interval."""
    values = [one["value"] for one in ones]
    if others:
        values = [value - other["value"] for value, other in zip(values, others, strict=True)]
    values = [value for value in values if not math.isnan(value)]
    low = high = math.nan
    if len(values) > 1:
        found = intervals.of_seeds(values)
        low, high = found.low, found.high
    return {"value": fmean(values) if values else math.nan, "low": low, "high": high, "seeds": len(values)}


def _keep_same_steps(networks: Sequence[Summary]) -> bool:
    return len({tuple(state["step"] for state in one["checkpoints"]) for one in networks}) == 1


def _mean_state(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of one checkpoint over the seeds: weight distance, and numbers of concepts."""
    kinds = [kind for kind in METRICS if kind in states[0]]
    mean = {"step": states[0]["step"], "weight_distance": fmean(state["weight_distance"] for state in states)}
    return mean | {kind: {"value": fmean(state[kind]["value"] for state in states)} for kind in kinds}
