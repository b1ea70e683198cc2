"""How good are frozen features: weighted kNN on mean-pooled patch tokens.

kNN is a poor judge of masked autoencoders (11 % kNN has been reported beside 81 % after fine-tuning): its trend over
a run says that features form, its level says little about the fine-tuned model.

    n images   D width   C classes
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from maedistill.data.index import ShardIndex
from maedistill.data.loader import CentreCrops, evaluation_batches
from maedistill.data.transforms import normalize, to_unit
from maedistill.data.workers import TIMEOUT_SECONDS
from maedistill.methods.mae import MAE
from maedistill.randomness import Stream, key, permute
from maedistill.training import distributed

NEIGHBOURS = 20
TEMPERATURE = 0.07  # Wu et al., 2018


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, k: int = NEIGHBOURS) -> float:
    """Share of queries whose class wins the vote of their k nearest neighbours by cosine, weighted by exp(cos / 0.07).

    bank [n, D] and queries [m, D] are features, the labels int64 [n] and [m]. Returns a share in [0, 1].
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    correct = 0
    for part, truth in zip(queries.split(1024), labels.split(1024), strict=True):
        cosine, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)  # [m', k]
        votes = torch.zeros(len(part), num_classes).scatter_add_(
            1, bank_labels[nearest], (cosine / TEMPERATURE).exp()
        )  # [m', C]
        correct += int((votes.argmax(1) == truth).sum())
    return correct / len(labels)


def spread_samples(index: ShardIndex, count: int, *, seed: int = 0) -> Tensor:
    """At most `count` sample ids, a fixed random choice: int64 [min(count, n)]."""
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
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> tuple[Tensor, Tensor]:
    """Mean-pooled patch tokens of centre crops, each sample once for any number of ranks: [n, D], labels int64 [n].

    Ranks take every world_size-th sample of a list padded to equal lengths (ZeRO 3 needs equally many forward passes)
    and the padding is cut off after the gather. The result is on the CPU, on every rank.
    """
    index.require_labels()
    rank, world_size = distributed.rank(), distributed.world_size()
    padded = len(samples) + -len(samples) % world_size
    mine = samples[torch.arange(rank, padded, world_size) % len(samples)]
    training = method.training
    method.eval()
    rows, labels = [], []
    for images, truth in evaluation_batches(
        CentreCrops(index, mine, size=size, share=share), batch=batch, workers=workers, timeout_seconds=timeout_seconds
    ):
        images = normalize(to_unit(images.to(method.mean.device)), method.mean, method.std)
        tokens, _ = method.encoder(images)  # [b, P + N, D]
        rows.append(tokens[:, method.encoder.num_prefix :].float().mean(1))
        labels.append(truth)
    method.train(training)
    gathered = [distributed.gather_rows(part) for part in (torch.cat(rows), torch.cat(labels).to(rows[0].device))]
    return tuple(
        part.unflatten(0, (world_size, -1)).transpose(0, 1).flatten(0, 1)[: len(samples)].cpu() for part in gathered
    )
