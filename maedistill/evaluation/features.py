"""Features of images, each computed once: the input of kNN and of the linear probe.

Network with a `Backbone`, ShardIndex -> extract_features -> features of every image, on the CPU of every rank
MAE, ShardIndex, some samples -> pooled_features -> the same during pre-training

Every rank holds all rows: 4 n D bytes, 3.9 GB for ImageNet's training images at D = 768.

n images   b batch   P prefix tokens (class, registers)   N patches   D width   s image side
"""

import torch
from torch import Tensor, nn

from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform
from maedistill.data.shards.index import ShardIndex
from maedistill.errors import NumericsError
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import Predictor, evaluation_mode, full_pass
from maedistill.methods.mae import MAE
from maedistill.models.encoder import Encoder
from maedistill.randomness import Stream, key, permute
from maedistill.weights.network import Network

Features = tuple[Tensor, Tensor]  # rows float32 [n, D], labels int64 [n]


def extract_features(network: Network, index: ShardIndex, context: EvalContext) -> Features:
    """Compute the features of each image with the network's `Backbone`, sorted by sample id. Collective.

    Leaves out images that cannot be decoded. Raises DataError if they are too many or one has no label, NumericsError
    if a feature is not finite.
    """
    images = EvaluationImages(index, torch.arange(len(index)), network.transform())
    predictor = Predictor(network.module, context, mean=network.mean, std=network.std)
    _, rows, labels = _compute(predictor, images, context)
    require_finite_rows(rows)
    return rows, labels


def pooled_features(
    method: MAE, index: ShardIndex, samples: Tensor, context: EvalContext, *, size: int, crop_pct: float
) -> Features:
    """Return mean-pooled patch tokens of centre crops of the samples, in their order. Collective.

    Leaves out images that cannot be decoded. Raises DataError if they are too many.
    """
    index.require_labels()
    images = EvaluationImages(index, samples, evaluation_transform(size=size, crop=crop_pct))
    predictor = Predictor(_PatchMean(method.encoder), context, mean=method.mean, std=method.std)
    ids, rows, labels = _compute(predictor, images, context)
    order = torch.searchsorted(ids, samples[torch.isin(samples, ids)])
    return rows[order], labels[order]


def random_subset(index: ShardIndex, count: int) -> Tensor:
    """Return at most `count` sample ids, always the same random choice: int64 [min(count, n)]."""
    return permute(torch.arange(min(count, len(index))), len(index), key(0, Stream.ORDER))


def require_finite_rows(rows: Tensor) -> None:
    """Raise NumericsError unless the features of all images, [n, ...], are finite."""
    if broken := int((~rows.flatten(1).isfinite().all(1)).sum()):
        raise NumericsError(
            f"the features of {broken} of {len(rows)} images are not finite",
            "use --precision fp32; if that does not help, the weights are broken: take an earlier checkpoint",
        )


class _PatchMean(nn.Module):
    """Map normalised images [b, 3, s, s] to the mean of an encoder's patch tokens, [b, D]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        tokens, _ = self.encoder(images)  # [b, P + N, D]
        return tokens[:, self.encoder.num_prefix :].float().mean(1)


def _compute(predictor: Predictor, images: EvaluationImages, context: EvalContext) -> tuple[Tensor, ...]:
    """Return ids int64 [n], ascending, features [n, D] and labels [n]."""
    with evaluation_mode(predictor.network):
        return full_pass(images, lambda pixels, labels: (predictor(pixels), labels), context)
