"""Networks that differ in the seed of their training alone, taken together.

    labels/seed_0/finetune, labels/seed_1/finetune, ... -> labels/finetune, with 95 % intervals over seeds

Intervals over images say what other images would change, these what other trainings would change.
"""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from maedistill.analysis.concepts import COURSE_METRICS, METRICS
from maedistill.report import intervals

Summary = Mapping[str, Any]  # of `concepts.summarize`
_SEED = re.compile(r"(^|/)seed_(\d+)(/|$)")


def group_seeds(names: Sequence[str]) -> dict[str, dict[int, str]]:
    """Return the networks of each group, by seed: those whose names differ in a folder `seed_N` alone, two at least."""
    groups: dict[str, dict[int, str]] = {}
    for name in names:
        if len(found := _SEED.findall(name)) == 1:
            group = _SEED.sub(lambda match: match[1] and match[3], name) or "all seeds"
            groups.setdefault(group, {})[int(found[0][1])] = name
    return {group: seeds for group, seeds in groups.items() if len(seeds) > 1}


def over_seeds(networks: Mapping[str, Summary]) -> dict[str, dict[str, Any]]:
    """Return the summary of each group: metrics with intervals over seeds, and their difference to the first group.

    The checkpoints have the means over the seeds, if all seeds keep the same steps.
    """
    groups, found = group_seeds([*networks]), {}
    base = next(iter(groups), "")
    for name, seeds in groups.items():
        members = [networks[one] for one in seeds.values()]
        found[name] = {"seeds": [*seeds], "metrics": _with_intervals([one["metrics"] for one in members])}
        if _keep_same_steps(members):
            states = zip(*(one["checkpoints"] for one in members), strict=True)
            found[name]["checkpoints"] = [_mean_state(one) for one in states]
        shared = [seed for seed in seeds if seed in groups[base]]
        if name != base and len(shared) > 1:
            pairs = [(networks[seeds[seed]], networks[groups[base][seed]]) for seed in shared]
            found[name]["difference"] = {"to": base, "metrics": _differences(pairs)}
    return found


def _with_intervals(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return mean and interval of each metric that all networks have."""
    kinds = [kind for kind in METRICS if all(kind in one for one in metrics)]
    return {kind: _interval([one[kind]["value"] for one in metrics]) for kind in kinds}


def _differences(pairs: Sequence[tuple[Summary, Summary]]) -> dict[str, dict[str, Any]]:
    """Return the mean of the differences of each metric, seed by seed, with its interval."""
    metrics = [(one["metrics"], other["metrics"]) for one, other in pairs]
    kinds = [kind for kind in METRICS if all(kind in each for pair in metrics for each in pair)]
    if not all(map(_keep_same_steps, pairs)):
        kinds = [kind for kind in kinds if kind not in COURSE_METRICS]
    return {kind: _interval([one[kind]["value"] - other[kind]["value"] for one, other in metrics]) for kind in kinds}


def _interval(values: Sequence[float]) -> dict[str, Any]:
    found = intervals.of_seeds(values)
    return {"value": found.value, "low": found.low, "high": found.high, "seeds": len(values)}


def _keep_same_steps(networks: Sequence[Summary]) -> bool:
    return len({tuple(state["step"] for state in one["checkpoints"]) for one in networks}) == 1


def _mean_state(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of one checkpoint over the seeds: weight distance, and numbers of concepts."""
    kinds = [kind for kind in METRICS if kind in states[0]]
    mean = {"step": states[0]["step"], "weight_distance": fmean(state["weight_distance"] for state in states)}
    return mean | {kind: {"value": fmean(state[kind]["value"] for state in states)} for kind in kinds}
