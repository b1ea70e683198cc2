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

from maedistill.evaluation.features import Features
from maedistill.processes import distributed

NEIGHBOURS = 20
TEMPERATURE = 0.07  # Wu et al., 2018
_QUERIES, _BANK = 2048, 16384  # rows of one chunk: 128 MiB of cosines
_CPU = torch.device("cpu")


def knn_predictions(
    bank: Features,
    queries: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
    device: torch.device = _CPU,
) -> Tensor:
    """Predict by the vote of the k nearest in the bank, weighted by exp(cosine / temperature): int64 [K, m].

    bank: n features with labels; queries [m, D]; both on the CPU. Each of ks is at most n. Ties go to the lower class.
    The computation runs on `device`.
    """
    rows, labels = bank
    assert all(1 <= k <= len(rows) for k in ks) and temperature > 0
    num_classes = int(labels.max()) + 1
    predictions = []
    for part in queries.split(_QUERIES):
        cosine, nearest = _nearest(rows, part.to(device), max(ks))  # [q, k], best first
        voters = labels.to(device)[nearest]  # [q, k]
        weights = ((cosine - cosine[:, :1]) / temperature).exp()  # relative to the best, so that exp cannot overflow
        votes = (torch.zeros(len(part), num_classes, device=device) for _ in ks)  # [q, C] each
        won = [v.scatter_add_(1, voters[:, :k], weights[:, :k]).argmax(1) for v, k in zip(votes, ks, strict=True)]
        predictions.append(torch.stack(won).cpu())  # [K, q]
    return torch.cat(predictions, dim=1)


def knn_counts(
    bank: Features, queries: Features, *, ks: Sequence[int], temperature: float = TEMPERATURE, device: torch.device
) -> list[int]:
    """Count for each k the queries whose label wins the vote of `knn_predictions`. Collective.

    Every rank holds all features and classifies its share of the queries.
    """
    rows, labels = (part[distributed.rank() :: distributed.world_size()] for part in queries)
    predictions = knn_predictions(bank, rows, ks=ks, temperature=temperature, device=device)
    counts = (predictions == labels).sum(1)[None].to(device)  # [1, K]
    return distributed.all_gather_rows(counts).sum(0).tolist()


def knn_accuracy(bank: Features, queries: Features, *, k: int = NEIGHBOURS, device: torch.device) -> float:
    """Return the accuracy, in [0, 1], from `knn_counts`; k is at most the size of the bank. Collective."""
    (count,) = knn_counts(bank, queries, ks=[min(k, len(bank[1]))], device=device)
    return count / len(queries[1])


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
