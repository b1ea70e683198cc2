"""How good is a classifier: every image of a set of shards exactly once, on any number of processes.

    EvaluationImages -> this rank's share in whole batches -> logits -> rows (id, label, best classes, loss)
    rows of all ranks -> without padding, sorted by id, each sample asked for once or an error -> Evaluation

Where the images run out, a batch is filled with padding. So all ranks run equally many forward passes (ZeRO 3 needs
that), all of one shape. More processes move an image to another place in its batch, where kernels may round
differently: losses agree to the last bits, counts unless two logits tie that closely.

    n images   b batch   s image side   C classes   k classes that are kept, min(5, C)
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maedistill.data.evaluation import PADDING, EvaluationImages, exact_batches, rank_share
from maedistill.data.index import ShardIndex
from maedistill.data.reader import sample_name
from maedistill.data.transforms import normalize, to_unit
from maedistill.data.workers import TIMEOUT_SECONDS
from maedistill.errors import DataError, NumericsError
from maedistill.machine import DTYPES
from maedistill.training import distributed
from maedistill.training.records import write_text

_KEPT = 5  # classes kept of each image


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a classifier said about each image, on the CPU, sorted by id. Counts are whole numbers, never averages."""

    ids: Tensor  # int64 [n], ascending
    labels: Tensor  # int64 [n]
    predictions: Tensor  # int64 [n, k], best first
    losses: Tensor  # float32 [n], cross-entropy

    @property
    def images(self) -> int:
        """How many images."""
        return len(self.ids)

    @property
    def top1(self) -> int:
        """Images whose label is the best class."""
        return int((self.predictions[:, 0] == self.labels).sum())

    @property
    def top5(self) -> int:
        """Images whose label is among the five best classes."""
        return int((self.predictions == self.labels[:, None]).sum())

    @property
    def loss(self) -> float:
        """Mean cross-entropy: the exact sum, rounded once, so that no order of summation matters."""
        return math.fsum(self.losses.tolist()) / self.images

    def line(self) -> str:
        """The result in one line."""
        parts = [
            f"{name} {100 * count / self.images:.2f} % ({count} of {self.images})"
            for name, count in (("top-1", self.top1), ("top-5", self.top5))
        ]
        return f"{', '.join(parts)}, loss {self.loss:.4f}"


@torch.no_grad()
def evaluate(
    network: nn.Module,
    images: EvaluationImages,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch: int,
    workers: int,
    device: torch.device,
    precision: str = "fp32",
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Evaluation:
    """Collective. Shows each of `images` to `network` (on `device`; normalised [b, 3, s, s] -> logits [b, C]) once.

    batch: images per forward pass and rank. precision: fp32, or bf16 or fp16 under autocast. timeout_seconds: as in
    `load_batches`. The network keeps its mode. Raises DataError for images without a label, with a label that is no
    class of the network, or undecodable; NumericsError where a loss is not finite.
    """
    if not len(images.samples):
        raise DataError("the shards hold no image to evaluate on", "name shards that hold labelled images")
    images.index.require_labels()
    batch = min(batch, len(images.samples))
    share = rank_share(images.samples, rank=distributed.rank(), world_size=distributed.world_size())
    whole = F.pad(share, (0, -len(share) % batch), value=PADDING)
    means, stds = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
    dtype, found = DTYPES[precision], []
    with evaluation_mode(network):
        mine = EvaluationImages(images.index, whole, images.transform)
        for pixels, labels, ids in exact_batches(mine, batch=batch, workers=workers, timeout_seconds=timeout_seconds):
            x = normalize(to_unit(pixels.to(device, non_blocking=True)), means, stds)  # [b, 3, s, s]
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                logits = network(x)  # [b, C]
            if not found:  # all ranks look at all labels, so that all of them refuse
                _require_known_classes(images, logits.shape[1])
            found.append(_judge(logits.float(), labels.to(device), ids.to(device)))
    rows, losses = (distributed.gather_rows(torch.cat(part)).cpu() for part in zip(*found, strict=True))
    return _assemble(rows, losses, images)


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards each of the network's modules is in the mode it was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def write_predictions(path: Path, evaluation: Evaluation, index: ShardIndex) -> None:
    """Writes a CSV file, whole or not at all: id, shard, key, label, loss, the best classes, and names if known."""
    best = [f"top{place + 1}" for place in range(evaluation.predictions.shape[1])]
    names = dict(enumerate(index.classes))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", "shard", "key", "label", "loss", *best, *(["label_name", "top1_name"] if names else [])])
    columns = (evaluation.ids, evaluation.labels, evaluation.losses, evaluation.predictions)
    for i, label, loss, classes in zip(*(column.tolist() for column in columns), strict=True):
        shard = Path(index.shards[index.shard_of(i)]).name
        named = [names.get(label, ""), names.get(classes[0], "")] if names else []
        table.writerow(
            [i, shard, index.key(i), label, f"{loss:.9g}", *classes, *named]
        )  # 9 digits are all of a float32
    write_text(Path(path), text.getvalue())


def _judge(logits: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (id, label, best classes) int64 [b, 2 + k] and losses [b] of one batch, on its device."""
    order = logits.sort(dim=1, descending=True, stable=True).indices  # [b, C]; of equal logits the lower class is first
    rows = torch.cat([ids[:, None], labels[:, None], order[:, :_KEPT]], dim=1)  # [b, 2 + k]
    return rows, F.cross_entropy(logits, labels, reduction="none", ignore_index=PADDING)


def _assemble(rows: Tensor, losses: Tensor, images: EvaluationImages) -> Evaluation:
    """Sorts the rows of all ranks by id, drops padding, and checks that nobody is missing or counted twice."""
    order = rows[:, 0].argsort()
    order = order[rows[order, 0] != PADDING]  # [n]
    rows, losses = rows[order], losses[order]
    asked = images.samples.sort().values  # [n]
    assert (asked.diff() > 0).all(), "a sample is asked for twice"
    assert torch.equal(rows[:, 0], asked), "the images that were seen are not those that were asked for"
    if not losses.isfinite().all():
        broken = int((~losses.isfinite()).sum())
        first = sample_name(images.index, int(rows[~losses.isfinite()][0, 0]))
        raise NumericsError(
            f"the loss of {broken} of {len(losses)} images is not finite, first {first}",
            "evaluate in precision fp32; if that does not help, the weights are broken: take an earlier checkpoint",
        )
    return Evaluation(ids=rows[:, 0], labels=rows[:, 1], predictions=rows[:, 2:], losses=losses)


def _require_known_classes(images: EvaluationImages, num_classes: int) -> None:
    """Raises DataError where a label is no class of the network: every count would be wrong."""
    labels = images.index.labels[images.samples.numpy()]  # [n]
    unknown = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(unknown):
        i = int(images.samples[unknown[0]])
        raise DataError(
            f"the model has {num_classes} classes, 0 to {num_classes - 1}, but {len(unknown)} of {len(labels)} images "
            f"have other labels, first {sample_name(images.index, i)} with {images.index.labels[i]}",
            "use shards with the classes that the model was trained on, or fine-tune it on these (tools/finetune.py)",
        )
