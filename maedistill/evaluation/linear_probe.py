"""Linear probe of frozen features: one linear classifier per learning rate, all in one pass (MAE's protocol).

    features, computed once -> BatchNorm without scale and shift -> a linear head per learning rate -> accuracy of each

The heads share only the batches and their normalisation. Each trains exactly as it would alone, so the learning rates
can be divided among processes. LARS (or SGD), momentum 0.9, no weight decay, warm-up for a tenth of the updates, then
half a cosine to 0. MAE uses batches of 16,384 of 1.28 million images, 90 epochs, learning rate 0.1 per 256 images.
Maps have a feature in each cell, and a loss of their own: see `segmentation.py`, which uses AdamW.

    n images   b batch   D width   C classes   H heads
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from timm.optim import Lars
from torch import Tensor, nn
from torch.nn import functional as F

from maedistill.evaluation.accuracy import Score, best_classes
from maedistill.evaluation.features import Features
from maedistill.processes import distributed
from maedistill.randomness import Stream, key, permute
from maedistill.training.optim import build_schedule

OptimizerName = Literal["lars", "sgd", "adamw"]
_CHUNK = 4096  # features per chunk when heads are scored
_MOMENTUM = 0.9
_SEED = 0  # of the initial weights and of the order of the features
_LEAST_UPDATES = 4  # per epoch: a batch is at most 1 / _LEAST_UPDATES of the features
_OPTIMIZERS: dict[OptimizerName, Callable[..., Any]] = {
    "lars": partial(Lars, momentum=_MOMENTUM),
    "sgd": partial(torch.optim.SGD, momentum=_MOMENTUM),
    "adamw": partial(torch.optim.AdamW, weight_decay=0.0),
}


@dataclass(frozen=True)
class ProbeRecipe:
    """How the heads are trained. batch: features per update."""

    epochs: int
    batch: int
    optimizer: OptimizerName = "lars"

    def fit_batch(self, num_features: int) -> "ProbeRecipe":
        """Reduce the batch to at most a quarter of the features, and at least 2 (for BatchNorm)."""
        return replace(self, batch=max(2, min(self.batch, num_features // _LEAST_UPDATES)))


_SHORT_RATES, _SHORT_RECIPE = (0.3, 3.0, 30.0), ProbeRecipe(epochs=30, batch=512)  # during pre-training


@dataclass(frozen=True)
class ProbeScore(Score):
    """The score of one learning rate."""

    lr: float  # per 256 images

    def metrics(self) -> dict[str, Any]:
        """Return the entries for a result file."""
        return super().metrics() | {"lr": self.lr}


class LinearHeads(nn.Module):
    """BatchNorm without scale and shift, then H linear classifiers, one per learning rate, initialised identically."""

    def __init__(self, width: int, num_classes: int, *, rates: Sequence[float]) -> None:
        super().__init__()
        self.rates = tuple(rates)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        heads = [nn.utils.skip_init(nn.Linear, width, num_classes) for _ in rates]
        for head in heads:
            nn.init.trunc_normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(_SEED))
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def forward(self, rows: Tensor) -> list[Tensor]:
        """Map features [b, D], or maps [b, h, w, D], to the logits of every head, H times [b, C] or [b, h, w, C]."""
        rows = self.norm(rows.flatten(0, -2)).view(rows.shape)
        return [head(rows) for head in self.heads]


def probe_accuracy(train: Features, val: Features, *, device: torch.device) -> float:
    """Return the validation accuracy of the best of three short probes: a trend to watch during pre-training.

    The probes are divided among the ranks. Does not use torch's global generators. Collective.
    """
    num_classes, mine = int(torch.cat([train[1], val[1]]).max()) + 1, 0.0
    recipe = _SHORT_RECIPE.fit_batch(len(train[1]))
    if rates := _SHORT_RATES[distributed.rank() :: distributed.world_size()]:
        heads = fit_heads(*train, recipe, rates=rates, num_classes=num_classes, device=device)
        mine = max(score.top1 for score in score_heads(heads, *val))
    return max(distributed.gather_objects(mine))


def fit_heads(
    rows: Tensor,
    labels: Tensor,
    recipe: ProbeRecipe,
    *,
    rates: Sequence[float],
    num_classes: int,
    device: torch.device,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    home: torch.device | None = None,
) -> LinearHeads:
    """Train a head for every rate on features [n, D] with labels int64 [n], n at least the batch.

    Each epoch uses every feature once, in a fixed random order, and drops the last incomplete batch. Rates are per 256
    images, but for AdamW. loss: of a head's logits and the labels; with one of its own, features may be maps. home:
    where the features stay, if there are too many for the device.
    """
    epochs, batch = recipe.epochs, recipe.batch
    assert 2 <= batch <= len(rows) and epochs >= 1
    heads = LinearHeads(rows.shape[-1], num_classes, rates=rates).to(device).train()
    rows, labels = rows.to(home or device), labels.to(home or device)
    # LARS adapts the rates of the weights only, not of the biases, as in MAE. SGD ignores `always_adapt`.
    groups = [
        {"params": [parameter], "lr_scale": rate, "always_adapt": parameter.ndim > 1}
        for rate, head in zip(rates, heads.heads, strict=True)
        for parameter in head.parameters()
    ]
    update = _OPTIMIZERS[recipe.optimizer](groups, lr=1.0 if recipe.optimizer == "adamw" else batch / 256)
    steps = len(rows) // batch
    schedule = build_schedule(update, min_lr=0.0, warmup_steps=epochs * steps // 10, total_steps=epochs * steps)
    for epoch in range(epochs):
        order = permute(torch.arange(len(rows)), len(rows), key(_SEED, Stream.ORDER, epoch)).to(rows.device)  # [n]
        for step in range(steps):
            schedule.step_update(epoch * steps + step)
            chosen = order[step * batch : (step + 1) * batch]  # [b]
            update.zero_grad()
            here, truth = rows[chosen].to(device), labels[chosen].to(device)
            for logits in heads(here):
                loss(logits, truth).backward()  # head by head: only one has its intermediate results in memory
            update.step()
    return heads.eval()


@torch.no_grad()
def score_heads(heads: LinearHeads, rows: Tensor, labels: Tensor) -> list[ProbeScore]:
    """Return the score of each head on features [n, D], in the order of the rates."""
    device = next(heads.parameters()).device
    counts = torch.zeros(len(heads.rates), 2, dtype=torch.int64, device=device)  # [H, 2]
    losses: list[list[Tensor]] = [[] for _ in heads.rates]
    for part, truth in zip(rows.split(_CHUNK), labels.split(_CHUNK), strict=True):
        truth = truth.to(device)
        for i, logits in enumerate(heads(part.to(device))):
            correct = best_classes(logits) == truth[:, None]  # [b, min(5, C)]
            counts[i] += torch.stack([correct[:, 0].sum(), correct.sum()])
            losses[i].append(F.cross_entropy(logits, truth, reduction="none").cpu())
    means = [math.fsum(torch.cat(part).tolist()) / len(labels) for part in losses]
    scores = zip(counts.tolist(), means, heads.rates, strict=True)
    return [ProbeScore(len(labels), top1, top5, loss, lr) for (top1, top5), loss, lr in scores]
