"""One pass over a set of shards that processes every image exactly once, on any number of processes.

What is computed of each image is in `accuracy.py`, `agreement.py` and `features.py`.

    EvaluationImages -> this rank's share in full batches -> process_batch(pixels, labels) -> rows of tensors
    rows of all ranks -> padding removed, sorted by id; an error unless each sample occurs exactly once
    images that cannot be decoded -> left out, named; an error if they are many

The last batch is filled with padding, so all ranks run the same number of forward passes (ZeRO 3 needs that), all of
one shape. The number of processes changes an image's position in its batch, where kernels may round differently:
values agree up to the last bits, and counts agree unless two classes tie that closely.

    n images   b batch   s image side   C outputs of a network
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maedistill.data.images.transforms import normalize, to_float01
from maedistill.data.loading.evaluation import PADDING, EvaluationImages, exact_batches, rank_share, undecodable
from maedistill.errors import DataError, join_first
from maedistill.escaping import warn
from maedistill.evaluation.context import EvalContext
from maedistill.processes import distributed
from maedistill.runs.progress import max_bad

_NAMED = 3  # images that cannot be decoded and are named
_TOGETHER = 64  # batches gathered at once: few collectives, and the device holds the rows of no more than these


class Predictor:
    """A network with its normalisation, moved to the device: pixels uint8 [b, 3, s, s] -> float32 outputs [b, C].

    columns: int64 [C], the outputs to return, in that order; None for all outputs.
    """

    def __init__(
        self,
        network: nn.Module,
        context: EvalContext,
        *,
        mean: Sequence[float] | Tensor,
        std: Sequence[float] | Tensor,
        columns: Tensor | None = None,
    ) -> None:
        self.network, self.context = network.to(context.device), context
        self.mean, self.std = (torch.as_tensor(x, device=context.device).view(3, 1, 1) for x in (mean, std))
        self.columns = None if columns is None else columns.to(context.device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the outputs for pixels that are on the device."""
        x = normalize(to_float01(pixels), self.mean, self.std)  # [b, 3, s, s]
        with self.context.autocast():
            outputs = self.network(x)
        return (outputs if self.columns is None else outputs[:, self.columns]).float()


@torch.no_grad()
def full_pass(
    images: EvaluationImages, process_batch: Callable[[Tensor, Tensor], tuple[Tensor, ...]], context: EvalContext
) -> tuple[Tensor, ...]:
    """Return ids int64 [n], ascending, then the rows that `process_batch` returned, on the CPU of every rank.

    Images that cannot be decoded are not among them: rank 0 warns and names the first. More than `max_bad_fraction`
    allows in training, or than a quarter of the images, are a DataError.

    process_batch: called with pixels uint8 [b, ...] and labels int64 [b] on the device, with the same b each time;
    returns tensors [b, ...]. Collective.
    """
    asked = images.samples.sort().values  # [n]
    assert len(asked), "no sample is asked for"
    assert (asked.diff() > 0).all(), "a sample is asked for twice"
    batch = min(context.batch, len(asked))
    share = rank_share(images.samples, rank=distributed.rank(), world_size=distributed.world_size())
    mine = images.with_samples(F.pad(share, (0, -len(share) % batch), value=PADDING))
    batches = exact_batches(
        mine, batch=batch, workers=context.workers, device=context.device, timeout_seconds=context.timeout_seconds
    )
    outputs = ((ids, *process_batch(pixels, labels)) for pixels, labels, ids in batches)
    parts = []  # rows of all ranks, on the CPU
    while together := list(itertools.islice(outputs, _TOGETHER)):
        parts.append([distributed.all_gather_rows(torch.cat(part)).cpu() for part in zip(*together, strict=True)])
    ids, *rows = (torch.cat(part) for part in zip(*parts, strict=True))
    order = ids.argsort()
    order, bad = order[ids[order] >= 0], undecodable(ids[ids < PADDING]).sort().values  # [n], [asked - n]
    seen = torch.cat([ids[order], bad]).sort().values
    assert torch.equal(seen, asked), "the images that were seen are not those that were asked for"
    if len(bad):
        report_bad(images, bad, context)
    return tuple(part[order] for part in (ids, *rows))


def left_out(images: EvaluationImages, ids: Tensor) -> Tensor:
    """Return the ids that are not among those of a full pass, since they could not be decoded: int64, ascending."""
    return images.samples[~torch.isin(images.samples, ids)].sort().values


def report_bad(images: EvaluationImages, bad: Tensor, context: EvalContext) -> None:
    """Name the first of the images that cannot be decoded: in a warning, or in a DataError if they are too many."""
    count, total = len(bad), len(images.samples)
    names = [*map(images.why_bad, bad[:_NAMED].tolist()), *[""] * (count - _NAMED)]
    text = f"{count:,} of {total:,} images cannot be decoded: {join_first(names, _NAMED, separator='; ')}"
    if count > min(max_bad(total, context.max_bad_fraction), (total + 2) // 4):
        raise DataError(
            f"{text}; more than an evaluation may leave out",
            "repair the images, or write the shards again without them (maedistill shards); in training "
            "data.max_bad_fraction allows more, up to a quarter",
        )
    if distributed.is_main():
        _warn_once(f"{text}; the figures leave {'it' if count == 1 else 'them'} out")


_warn_once = cache(warn)  # training evaluates the same images again and again


@contextmanager
def evaluation_mode(*networks: nn.Module) -> Iterator[None]:
    """Put the networks into eval mode inside the block; afterwards restore the mode of each of their modules."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
