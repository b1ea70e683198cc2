"""Linear probe of frozen features: one linear classifier per learning rate, all in one pass (MAE's protocol).

    features, computed once -> BatchNorm without scale and shift -> a linear head per learning rate -> accuracy of each

The heads share only the batches and their normalisation. Each trains exactly as it would alone, so the learning rates
can be divided among processes. LARS (or SGD), momentum 0.9, no weight decay, warm-up for a tenth of the updates, then
half a cosine to 0. MAE uses batches of 16,384 of 1.28 million images, 90 epochs, learning rate 0.1 per 256 images.

    n images   b batch   D width   C classes   H heads
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from timm.optim import Lars
from torch import Tensor, nn
from torch.nn import functional as F

from maedistill.randomness import Stream, key, permute
from maedistill.training.optim import build_schedule

OptimizerName = Literal["lars", "sgd"]
_SHORT_RATES, _SHORT_EPOCHS, _SHORT_BATCH = (0.3, 3.0, 30.0), 30, 512  # during pre-training
_JUDGED = 4096  # features per chunk when heads are scored
_MOMENTUM = 0.9
_LEAST_UPDATES = 4  # per epoch: a batch is at most 1 / _LEAST_UPDATES of the features


@dataclass(frozen=True)
class ProbeScore:
    """The score of one learning rate. loss: mean cross-entropy, not finite if training diverged."""

    lr: float  # per 256 images
    images: int
    top1: int
    top5: int
    loss: float

    @property
    def is_finite(self) -> bool:
        """Return whether the loss is finite, that is, whether training did not diverge."""
        return math.isfinite(self.loss)

    def facts(self) -> dict[str, float | None]:
        """Return the entries for a result file, with None for a loss that is not finite, which JSON cannot hold."""
        return asdict(self) | {"loss": self.loss if self.is_finite else None}


class LinearHeads(nn.Module):
    """BatchNorm without scale and shift, then H linear classifiers, one per learning rate, initialised identically."""

    def __init__(self, width: int, num_classes: int, *, rates: Sequence[float], seed: int = 0) -> None:
        super().__init__()
        self.rates = tuple(rates)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.heads = nn.ModuleList(nn.utils.skip_init(nn.Linear, width, num_classes) for _ in rates)
        for head in self.heads:
            nn.init.trunc_normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
            nn.init.zeros_(head.bias)

    def forward(self, rows: Tensor) -> list[Tensor]:
        """Map features [b, D] to the logits of every head, H times [b, C]."""
        rows = self.norm(rows)
        return [head(rows) for head in self.heads]

    def groups(self) -> list[dict[str, Any]]:
        """Return parameter groups: each head at its rate; LARS adapts only the weights, not the biases, as in MAE."""
        return [
            {"params": [parameter], "lr_scale": rate, "always_adapt": parameter.ndim > 1}
            for head, rate in zip(self.heads, self.rates, strict=True)
            for parameter in head.parameters()
        ]


def probe_accuracy(rows: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, *, device: torch.device) -> float:
    """Return the accuracy of the best of three short probes on the queries: a trend to watch during pre-training.

    rows [n, D] and queries [m, D] are features, the labels int64 [n] and [m]. Does not use torch's global generators.
    """
    classes = int(max(labels.max(), truth.max())) + 1
    batch = batch_of(len(rows), _SHORT_BATCH)
    heads = fit_heads(
        rows, labels, rates=_SHORT_RATES, epochs=_SHORT_EPOCHS, batch=batch, num_classes=classes, device=device
    )
    return max(score.top1 for score in judge_heads(heads, queries, truth)) / len(truth)


def batch_of(num_features: int, wanted: int) -> int:
    """Return the batch size: `wanted`, but at most a quarter of the features and at least 2 (for BatchNorm)."""
    return max(2, min(wanted, num_features // _LEAST_UPDATES))


def fit_heads(
    rows: Tensor,
    labels: Tensor,
    *,
    rates: Sequence[float],
    epochs: int,
    batch: int,
    optimizer: OptimizerName = "lars",
    num_classes: int,
    seed: int = 0,
    device: torch.device,
) -> LinearHeads:
    """Train a head for every rate (per 256 images) on features [n, D] with labels int64 [n], n at least `batch`.

    Each epoch uses every feature once, in an order fixed by the seed, and drops the last incomplete batch.
    """
    assert 2 <= batch <= len(rows) and epochs >= 1
    heads = LinearHeads(rows.shape[1], num_classes, rates=rates, seed=seed).to(device).train()
    rows, labels = rows.to(device), labels.to(device)
    build = {"lars": Lars, "sgd": _plain_sgd}[optimizer]
    update = build(heads.groups(), lr=1.0, momentum=_MOMENTUM)
    steps = len(rows) // batch
    schedule = build_schedule(
        update, peak=batch / 256, min_lr=0.0, warmup_steps=epochs * steps // 10, total_steps=epochs * steps
    )
    for epoch in range(epochs):
        order = permute(torch.arange(len(rows)), len(rows), key(seed, Stream.ORDER, epoch)).to(device)  # [n]
        for step in range(steps):
            schedule.step_update(epoch * steps + step)
            chosen = order[step * batch : (step + 1) * batch]  # [b]
            losses = [F.cross_entropy(logits, labels[chosen]) for logits in heads(rows[chosen])]
            update.zero_grad()
            torch.stack(losses).sum().backward()
            update.step()
    return heads.eval()


@torch.no_grad()
def judge_heads(heads: LinearHeads, rows: Tensor, labels: Tensor) -> list[ProbeScore]:
    """Return the score of each head on features [n, D], in the order of the rates."""
    device = next(heads.parameters()).device
    counts = torch.zeros(len(heads.rates), 2, dtype=torch.int64, device=device)  # [H, 2]
    losses: list[list[Tensor]] = [[] for _ in heads.rates]
    for part, truth in zip(rows.split(_JUDGED), labels.split(_JUDGED), strict=True):
        truth = truth.to(device)
        for i, logits in enumerate(heads(part.to(device))):
            best = logits.sort(dim=1, descending=True, stable=True).indices[:, :5] == truth[:, None]  # [b, 5]
            counts[i] += torch.stack([best[:, 0].sum(), best.sum()])
            losses[i].append(F.cross_entropy(logits, truth, reduction="none").cpu())
    means = [math.fsum(torch.cat(part).tolist()) / len(labels) for part in losses]
    scores = zip(heads.rates, counts.tolist(), means, strict=True)
    return [ProbeScore(lr, len(labels), top1, top5, loss) for lr, (top1, top5), loss in scores]


def _plain_sgd(groups: list[dict[str, Any]], **keywords: Any) -> torch.optim.SGD:
    """Build SGD, without the group entry that only LARS accepts."""
    bare = [{name: value for name, value in group.items() if name != "always_adapt"} for group in groups]
    return torch.optim.SGD(bare, **keywords)
