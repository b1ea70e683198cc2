"""kNN accuracy of frozen features: the weighted vote of the nearest neighbours by cosine (Wu et al., 2018).

kNN is a poor measure of masked autoencoders (11 % kNN has been reported beside 81 % after fine-tuning). Its trend over
a run shows that features form; its level says little about the fine-tuned model. Cosines are computed in chunks,
so memory beyond the features does not grow with the number of images.

    n images of the bank   m queries   q, p a chunk of m, n   D width   C classes   K values of k
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from maedistill.data.images.transforms import normalize, to_float01
from maedistill.data.loading.loader import CentreCrops, evaluation_batches
from maedistill.data.loading.workers import TIMEOUT_SECONDS
from maedistill.data.shards.index import ShardIndex
from maedistill.machine import DTYPES
from maedistill.machine import precision as resolve_precision
from maedistill.methods.mae import MAE
from maedistill.processes import distributed
from maedistill.randomness import Stream, key, permute

NEIGHBOURS = 20
TEMPERATURE = 0.07  # Wu et al., 2018
_QUERIES, _BANK = 2048, 16384  # rows of one chunk: 128 MiB of cosines
_CPU = torch.device("cpu")


def knn_predictions(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
    device: torch.device = _CPU,
) -> Tensor:
    """Predict by the vote of the k nearest in the bank, weighted by exp(cosine / temperature): int64 [K, m].

    bank [n, D] and queries [m, D] are features, bank_labels int64 [n], all on the CPU; each of ks is at most n. Ties go
    to the lower class. The computation runs on `device`.
    """
    assert all(1 <= k <= len(bank) for k in ks) and temperature > 0
    num_classes = int(bank_labels.max()) + 1
    found = []
    for part in queries.split(_QUERIES):
        cosine, nearest = _nearest(bank, part.to(device), max(ks))  # [q, k], best first
        voters = bank_labels.to(device)[nearest]  # [q, k]
        weights = ((cosine - cosine[:, :1]) / temperature).exp()  # relative to the best, so that exp cannot overflow
        votes = (torch.zeros(len(part), num_classes, device=device) for _ in ks)  # [q, C] each
        won = [v.scatter_add_(1, voters[:, :k], weights[:, :k]).argmax(1) for v, k in zip(votes, ks, strict=True)]
        found.append(torch.stack(won).cpu())  # [K, q]
    return torch.cat(found, dim=1)


def knn_counts(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
    device: torch.device,
) -> list[int]:
    """Count for each k the queries whose label in `labels` wins the vote of `knn_predictions`. Collective.

    Every rank holds all features and classifies its share of the queries.
    """
    share = torch.arange(len(queries))[distributed.rank() :: distributed.world_size()]
    mine = knn_predictions(bank, bank_labels, queries[share], ks=ks, temperature=temperature, device=device)
    right = (mine == labels[share]).sum(1)[None].to(device)  # [1, K]
    return distributed.gather_rows(right).sum(0).tolist()


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, k: int = NEIGHBOURS, device: torch.device
) -> float:
    """Return the accuracy, in [0, 1], from `knn_counts`; k is at most the size of the bank. Collective."""
    (count,) = knn_counts(bank, bank_labels, queries, labels, ks=[min(k, len(bank))], device=device)
    return count / len(labels)


def random_subset(index: ShardIndex, count: int, *, seed: int = 0) -> Tensor:
    """Return at most `count` sample ids, a random choice fixed by the seed: int64 [min(count, n)]."""
    return permute(torch.arange(min(count, len(index))), len(index), key(seed, Stream.ORDER))


@torch.no_grad()
def pooled_features(
    method: MAE,
    index: ShardIndex,
    samples: Tensor,
    *,
    size: int,
    share: float,
    batch: int,
    workers: int = 0,
    precision: str = "fp32",
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> tuple[Tensor, Tensor]:
    """Return mean-pooled patch tokens of centre crops, each sample once on any number of ranks: [n, D], labels [n].

    Each rank takes every world_size-th sample of a list padded to equal lengths, because ZeRO 3 needs equally many
    forward passes on all ranks. The padding is removed after the gather. The result is on the CPU of every rank:
    features in float32 whatever the `precision` of the forward pass (see `machine.precision`), labels in int64.
    """
    index.require_labels()
    rank, world_size = distributed.rank(), distributed.world_size()
    padded = len(samples) + -len(samples) % world_size
    mine = samples[torch.arange(rank, padded, world_size) % len(samples)]
    training, device = method.training, method.mean.device
    dtype = DTYPES[resolve_precision(precision, device)]
    method.eval()
    rows, labels = [], []
    crops = CentreCrops(index, mine, size=size, share=share)
    keywords = {"batch": batch, "workers": workers, "device": device, "timeout_seconds": timeout_seconds}
    for images, truth in evaluation_batches(crops, **keywords):
        images = normalize(to_float01(images), method.mean, method.std)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            tokens, _ = method.encoder(images)  # [b, P + N, D]
        rows.append(tokens[:, method.encoder.num_prefix :].float().mean(1))
        labels.append(truth)
    method.train(training)
    gathered = [distributed.gather_rows(torch.cat(part)) for part in (rows, labels)]
    return tuple(
        part.unflatten(0, (world_size, -1)).transpose(0, 1).flatten(0, 1)[: len(samples)].cpu() for part in gathered
    )


def _nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and bank indices of the k nearest, best first: [n, D], [q, D] -> [q, k], int64 [q, k]."""
    queries = F.normalize(queries.float(), dim=1)
    best = queries.new_empty(len(queries), 0)
    places = best.long()  # [q, 0]
    for start in range(0, len(bank), _BANK):
        part = F.normalize(bank[start : start + _BANK].to(queries.device).float(), dim=1)  # [p, D]
        cosine, nearest = (queries @ part.T).topk(min(k, len(part)), dim=1)
        best, places = torch.cat([best, cosine], dim=1), torch.cat([places, nearest + start], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        places = places.gather(1, order)
    return best, places
