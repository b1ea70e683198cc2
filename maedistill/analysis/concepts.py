"""Visual concepts and what is counted of them (Cheng et al., 2020), from the entropies of cells.

    entropies of each network [K, I, n] -> `reasons_to_leave_out` -> images that count for all of them
    -> `find_concepts` -> `per_image` -> metrics with intervals over images, and paired differences

A cell is a concept if its entropy is lower than that of the mean background cell by more than `MARGIN`.

    K checkpoints, oldest first   I images   n cells   R resamplings of the images
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from maedistill.randomness import Stream, uniform

Array = np.ndarray
MARGIN = 0.2  # nats; the paper's
RESAMPLINGS = 2000
METRICS = {  # name: what it is, in tables and charts
    "concepts": "concepts, cells per image",
    "foreground": "foreground concepts, cells per image",
    "background": "background concepts, cells per image",
    "ratio": "share of concepts in the foreground",
    "d_mean": "D_mean: weight distance at most concepts",
    "d_std": "D_std: its deviation over images",
    "rho": "rho: share of the concepts ever found that remain",
}
COURSE_METRICS = ("d_mean", "d_std", "rho")  # which depend on the checkpoints that there are


def reasons_to_leave_out(
    entropies: Sequence[Array], changes: Sequence[Array], foreground: Array | None
) -> dict[str, Array]:
    """Return which images are left out for all networks, and why: bool [I] by reason.

    entropies: [K, I, n] of each network. changes: [K, I], of its features. foreground: bool [I, n], or None. An image
    has to have a background that is discarded at least as much as its foreground, in the later half of each training.
    """
    reasons = {"no_response": np.any([(change == 0).any(0) for change in changes], axis=0)}
    if foreground is not None:
        inside, outside = foreground.sum(1), (~foreground).sum(1)  # [I]
        reasons["one_sided"] = (inside == 0) | (outside == 0)
        reasons["foreground_discarded"] = np.zeros(len(foreground), dtype=bool)
        for one in entropies:
            late = one[len(one) // 2 :]
            of_inside = (late * foreground).sum(2) / np.maximum(inside, 1)  # [K, I]
            of_outside = (late * ~foreground).sum(2) / np.maximum(outside, 1)
            reasons["foreground_discarded"] |= (of_outside < of_inside).any(0) & ~reasons["one_sided"]
    return reasons


def find_concepts(entropies: Array, foreground: Array | None) -> tuple[Array, Array]:
    """Return which cells are concepts, bool [K, I, n], and the entropy they are compared with, [K].

    entropies: [K, I, n] of the images that count. foreground: bool [I, n]; None: all cells are background, too.
    """
    background = np.ones(entropies.shape[1:], dtype=bool) if foreground is None else ~foreground
    baseline = entropies[:, background].mean(1)  # [K]
    return baseline[:, None, None] - entropies > MARGIN, baseline


def per_image(concepts: Array, foreground: Array | None, distances: Array) -> dict[str, Array]:
    """Return the values of each image, [I], from which metrics are computed; NaN where an image has none.

    concepts: bool [K, I, n]. distances: [K], the weight distance up to each checkpoint. The numbers of concepts are
    those of the last checkpoint. With one checkpoint there is no distance and no rho.
    """
    inside = np.ones(concepts.shape[1:], dtype=bool) if foreground is None else foreground
    counts = (concepts & inside).sum(2)  # [K, I]
    if foreground is None:
        values = {"concepts": counts[-1].astype(float)}
    else:
        others = (concepts[-1] & ~inside).sum(1)
        values = {"foreground": counts[-1].astype(float), "background": others.astype(float)}
        values["ratio"] = _divided(counts[-1], counts[-1] + others)
    if len(concepts) > 1:
        ever = (concepts & inside).any(0).sum(1)  # [I], cells that were a concept at any checkpoint
        values["distance"] = np.where(ever > 0, distances[counts.argmax(0)], np.nan)  # argmax: the first of equals
        values["rho"] = _divided(counts[-1], ever)
    return values


def metrics(values: Mapping[str, Array], others: Mapping[str, Array] | None = None) -> dict[str, dict[str, Any]]:
    """Return each metric with its 95 % interval over images, resampled with replacement `RESAMPLINGS` times.

    values: of `per_image`. With others, of another network on the same images: the differences to it, both networks
    having the same images in each resampling, those that have a value in both.
    """
    found = {}
    for name in METRICS:
        source = "distance" if name in ("d_mean", "d_std") else name
        pair = [each[source] for each in (values, others) if each and source in each]
        if len(pair) < (1 if others is None else 2):
            continue
        statistic, signs = np.std if name == "d_std" else np.mean, np.array([1, -1])[: len(pair)]
        known = np.stack(pair)[:, ~np.isnan(pair).any(0)]  # [1 or 2, count]
        value = low = high = np.nan
        count = known.shape[1]
        if count > (name == "d_std"):  # one image has no deviation
            value = signs @ statistic(known, axis=-1)
        if count > 1:
            parts = [statistic(known[:, draws], axis=-1) for draws in np.array_split(_resamplings(count), 20)]
            low, high = np.quantile(signs @ np.concatenate(parts, axis=1), [0.025, 0.975])
        found[name] = {"value": value, "low": low, "high": high, "images": count}
    return found


@lru_cache(maxsize=2)
def _resamplings(count: int) -> Array:
    return (uniform(0, torch.arange(RESAMPLINGS), Stream.RESAMPLE, n=count) * count).int().numpy()  # [R, count]


def summarize(
    entropies: Array, foreground: Array | None, *, steps: Sequence[int], distances: Sequence[float]
) -> tuple[dict[str, Any], dict[str, Array], Array]:
    """Return the result of a network, its values of each image, and maps of how far cells lie below the background.

    entropies: [K, I, n] of the images that count, which the maps [K, I, n] follow, in nats.
    """
    concepts, baseline = find_concepts(entropies, foreground)
    values = per_image(concepts, foreground, np.array(distances))
    course = [
        {"step": step, "weight_distance": distances[k], "background_entropy": baseline[k]}
        | metrics(per_image(concepts[k : k + 1], foreground, np.zeros(1)))
        for k, step in enumerate(steps)
    ]
    each = {kind: one.tolist() for kind, one in values.items()}
    result = {"metrics": metrics(values), "checkpoints": course, "each_image": each}
    return result, values, baseline[:, None, None] - entropies


def _divided(counts: Array, totals: Array) -> Array:
    return np.divide(counts, totals, out=np.full(len(counts), np.nan), where=totals > 0)
