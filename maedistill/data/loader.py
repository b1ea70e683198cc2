"""From positions to micro-batches: which samples this rank reads at each step, decoded and cropped by worker processes.

Step s of a run with global batch B takes the positions [sB, (s+1)B). Accumulation, ranks and workers only divide them:
micro-batch j of rank r takes the j-th block of world * m positions, and of it the r-th part. So a restart needs one
integer, and the number of ranks and workers changes nothing about what is read.

    m micro-batch   s crop size
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from maedistill.config.batch import BatchPlan
from maedistill.data.images import BadImage, decode_rgb
from maedistill.data.index import ShardIndex
from maedistill.data.order import SampleOrder
from maedistill.data.reader import ShardReader, sample_name
from maedistill.data.transforms import CROP_DRAWS, centre_crop, crop, random_box
from maedistill.data.workers import TIMEOUT_SECONDS, load_batches
from maedistill.errors import DataError
from maedistill.randomness import Stream, key, uniform

_REPLACEMENTS = 16  # so many bad samples in a row mean that the whole set is bad


@dataclass(frozen=True)
class Batch:
    """One micro-batch, and what had to be replaced in it."""

    images: Tensor  # uint8 [m, 3, s, s]
    positions: Tensor  # int64 [m]
    labels: Tensor  # int64 [m], of the samples that were really read; -1 where the index has none
    samples: Tensor  # int64 [m], stays on the host
    bad: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        images, positions, labels = (
            part.to(device, non_blocking=True) for part in (self.images, self.positions, self.labels)
        )
        return Batch(images, positions, labels, self.samples, self.bad)

    def pin_memory(self) -> "Batch":
        """Called by the loader when it feeds a GPU."""
        images, positions, labels = (part.pin_memory() for part in (self.images, self.positions, self.labels))
        return Batch(images, positions, labels, self.samples, self.bad)


class RandomCrops(Dataset[Batch]):
    """Random crops by position. A sample that cannot be decoded is replaced by a fixed function of (seed, position).

    augment: what is done to each crop, uint8 [3, s, s], at its position; a pure function of the two.
    """

    def __init__(
        self,
        index: ShardIndex,
        order: SampleOrder,
        *,
        seed: int,
        size: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        augment: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        self.index, self.order, self.seed = index, order, seed
        self.size, self.scale, self.ratio, self.augment = size, scale, ratio, augment
        self.reader = ShardReader(index)
        self._ahead: list[int] = []  # shards that were asked for last

    def __getitems__(self, positions: list[int]) -> Batch:
        """Reads one micro-batch. Views of one image stand side by side, so each image is decoded once."""
        if self.reader.is_remote and (ahead := self.order.shards_ahead(positions[-1])) != self._ahead:
            self._ahead = ahead
            self.reader.read_ahead(ahead)
        at = torch.tensor(positions)
        samples = self.order.samples(at)
        draws = uniform(self.seed, at, Stream.CROP, n=CROP_DRAWS).tolist()
        crops, bad, last, image = [], [], -1, None
        for i, (sample, visit) in enumerate(zip(samples.tolist(), (at // self.order.views).tolist(), strict=True)):
            if visit != last:  # not `sample`: an epoch may begin with what the last one ended with, another visit
                image, samples[i], failed = self._decode(sample, visit)
                bad += failed
                last = visit
            else:
                samples[i] = samples[i - 1]
            box = random_box(*image.shape[1:], draws[i], scale=self.scale, ratio=self.ratio)
            cut = crop(image, box, size=self.size)
            crops.append(self.augment(cut, positions[i]) if self.augment else cut)
        labels = torch.from_numpy(self.index.labels[samples.numpy()])  # [m]
        return Batch(torch.stack(crops), at, labels, samples, tuple(bad))

    def _decode(self, sample: int, visit: int) -> tuple[Tensor, int, list[str]]:
        """The image of a sample, or of its first decodable replacement; which sample it is; what failed before.

        visit: position // views, so that all views of an image share the replacement.
        """
        failed: list[str] = []
        for attempt in range(_REPLACEMENTS):
            try:
                return decode_rgb(self.reader.read(sample)), sample, failed
            except BadImage as error:
                failed.append(f"{sample_name(self.index, sample)}: {error}")
            word = key(self.seed, Stream.REPLACEMENT, visit, attempt)
            sample = int(self.order.unshuffled(torch.tensor(word % self.order.num_images)))
        raise _all_bad(failed[-1])


class CentreCrops(Dataset[tuple[Tensor, Tensor]]):
    """Centre crops of given samples with their labels, in the order given, for pictures and for kNN as a trend.

    A sample that cannot be decoded is replaced, label and all, by the next one that can: neither is worth a run.
    """

    def __init__(self, index: ShardIndex, samples: Tensor, *, size: int, share: float) -> None:
        self.index, self.samples, self.size, self.share = index, samples, size, share
        self.reader = ShardReader(index)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Images uint8 [b, 3, s, s] and labels int64 [b] of some places in `samples`."""
        found = [self._decode(sample) for sample in self.samples[rows].tolist()]
        crops = [centre_crop(image, size=self.size, share=self.share) for image, _ in found]
        return torch.stack(crops), torch.tensor([int(self.index.labels[sample]) for _, sample in found])

    def _decode(self, sample: int) -> tuple[Tensor, int]:
        """The image of a sample, or of the next decodable one, and which sample it is."""
        for _ in range(_REPLACEMENTS):
            try:
                return decode_rgb(self.reader.read(sample)), sample
            except BadImage as error:
                failed = f"{sample_name(self.index, sample)}: {error}"
            sample = (sample + 1) % len(self.index)
        raise _all_bad(failed)


def _all_bad(last: str) -> DataError:
    return DataError(
        f"{_REPLACEMENTS} samples in a row could not be decoded, the last is {last}",
        "check the shards with tools/make_shards.py --verify",
    )


def rank_positions(step: int, micro: int, *, plan: BatchPlan, rank: int, world_size: int) -> range:
    """The positions of one micro-batch of one rank: `plan.micro_batch` consecutive ones."""
    block = world_size * plan.micro_batch
    start = (step * plan.accumulation + micro) * block + rank * plan.micro_batch
    return range(start, start + plan.micro_batch)


class _Schedule:
    """The micro-batches of one rank from `first_step` on, as lists of positions: what a DataLoader calls a sampler."""

    def __init__(self, first_step: int, total_steps: int, *, plan: BatchPlan, rank: int, world_size: int) -> None:
        self.steps, self.plan, self.rank, self.world_size = range(first_step, total_steps), plan, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for micro in range(self.plan.accumulation):
                yield list(rank_positions(step, micro, plan=self.plan, rank=self.rank, world_size=self.world_size))


def training_batches(
    crops: RandomCrops,
    first_step: int,
    total_steps: int,
    *,
    plan: BatchPlan,
    rank: int,
    world_size: int,
    workers: int,
    device: torch.device,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Iterator[Batch]:
    """Micro-batches of the steps [first_step, total_steps) on `device`, `plan.accumulation` of them per step.

    timeout_seconds: as in `load_batches`.
    """
    schedule = _Schedule(first_step, total_steps, plan=plan, rank=rank, world_size=world_size)
    pin_memory, prefetch_factor = device.type == "cuda", 4 if workers else None
    batches = load_batches(
        crops,
        workers=workers,
        timeout_seconds=timeout_seconds,
        batch_sampler=schedule,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
    )
    return (batch.to(device) for batch in batches)


def evaluation_batches(
    crops: CentreCrops, *, batch: int, workers: int, timeout_seconds: float = TIMEOUT_SECONDS
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images uint8 [b, 3, s, s] and labels int64 [b] in order, the last batch as small as it is."""
    return load_batches(crops, workers=workers, timeout_seconds=timeout_seconds, batch_size=batch)
