"""Load micro-batches by position: choose this rank's samples at each step, decode and crop them in worker processes.

Step s of a run with global batch B reads the positions [sB, (s+1)B). Accumulation, ranks and workers only divide them:
micro-batch j of rank r is the r-th part of the j-th block of world * m positions. So the step is all that a resumed run
needs, and the number of ranks or workers does not change which samples a step reads.

    BatchSampler: positions -> RandomCrops in a worker -> slot, BatchHandle -> Batch -> on_device: a batch on the device

    m micro-batch   s crop size
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from maedistill.config.plan import BatchPlan
from maedistill.data.images.decode import JPEG_DECODERS, decode_rgb
from maedistill.data.images.transforms import CROP_DRAWS, crop, random_box
from maedistill.data.loading.batch import Batch, BatchHandle, SharedSlots, on_device
from maedistill.data.loading.dataset import open_reader
from maedistill.data.loading.order import SampleOrder
from maedistill.data.loading.workers import Images, load_batches
from maedistill.data.shards.index import ShardIndex
from maedistill.randomness import Stream, key, uniform

PREFETCHED = 4  # batches per worker, at most
_MOST_BYTES = 2 * 2**30  # of the batches ahead in each rank, if one per worker takes less; pinning takes as much again


@dataclass(eq=False, repr=False)
class RandomCrops(Images):
    """Random crops by position. An undecodable sample is replaced by another, chosen by (seed, position) alone.

    augment: applied to each crop, uint8 [3, s, s], and its position; a pure function of the two.
    decoder: for JPEGs, one of `JPEG_DECODERS`; all give the same pixels.
    """

    index: ShardIndex
    order: SampleOrder
    _: KW_ONLY
    seed: int
    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    augment: Callable[[Tensor, int], Tensor] | None = None
    decoder: str = JPEG_DECODERS[0]

    def __post_init__(self) -> None:
        self.reader = open_reader(self.index)
        self.slots: SharedSlots | None = None  # None: each batch has memory of its own
        self._ahead: list[int] = []  # shards of the last `read_ahead`

    def __getitems__(self, positions: list[int]) -> Batch | BatchHandle:
        """Read one micro-batch."""
        if self.slots is None:
            images = torch.empty(len(positions), self.size, self.size, 3, dtype=torch.uint8)
            return self.fill(images.permute(0, 3, 1, 2), positions)
        slot = self.slots.slot_of(positions[0])
        return BatchHandle(self.slots, slot, Batch, self.fill(self.slots.images[slot], positions)[1:])

    def fill(self, images: Tensor, positions: list[int]) -> Batch:
        """Read one micro-batch into `images`, uint8 [m, 3, s, s]. Decode an image once for its consecutive views."""
        if self.reader.is_remote and (ahead := self.order.shards_ahead(positions[-1])) != self._ahead:
            self._ahead = ahead
            self.reader.read_ahead(ahead)
        at = torch.tensor(positions)
        samples = self.order.samples(at).tolist()
        draws = uniform(self.seed, at, Stream.CROP, n=CROP_DRAWS).tolist()
        decode_one, bad = functools.partial(decode_rgb, decoder=self.decoder, apply_exif=self.index.apply_exif), []
        # Group by visit, not sample: an epoch may begin with the last sample of the one before, which is another visit.
        for visit, group in itertools.groupby(range(len(positions)), key=lambda i: positions[i] // self.order.views):
            views = list(group)
            candidates = self._candidates(samples[views[0]], visit)
            image, sample, errors = self.reader.read_first(candidates, decode_one)  # [3, H, W]
            bad += errors
            height, width = image.shape[1:]
            for i in views:
                box = random_box(height, width, draws[i], scale=self.scale, ratio=self.ratio)
                cut = crop(image, box, size=self.size)  # [3, s, s]
                images[i].copy_(self.augment(cut, positions[i]) if self.augment else cut)
                samples[i] = sample
        labels = torch.from_numpy(self.index.labels[samples])  # [m]
        return Batch(images, at, labels, torch.tensor(samples), tuple(bad))

    def _candidates(self, sample: int, visit: int) -> Iterator[int]:
        """Yield a sample, then its replacements. visit: position // views, so that all views of an image share them."""
        yield sample
        for attempt in itertools.count():
            word = key(self.seed, Stream.REPLACEMENT, visit, attempt)
            yield int(self.order.ids_at(torch.tensor(word % self.order.num_images)))


@dataclass(frozen=True)
class BatchSampler:
    """The positions of each micro-batch of one rank, in the steps [first_step, total_steps)."""

    first_step: int
    total_steps: int
    plan: BatchPlan
    rank: int
    world_size: int

    @property
    def block(self) -> int:
        """Return the number of positions between the starts of two consecutive micro-batches."""
        return self.world_size * self.plan.micro_batch

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.first_step * self.plan.accumulation, self.total_steps * self.plan.accumulation):
            start = number * self.block + self.rank * self.plan.micro_batch
            yield list(range(start, start + self.plan.micro_batch))


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
    **limits: float,
) -> Iterator[Batch]:
    """Return the micro-batches of the steps [first_step, total_steps) on `device`, `plan.accumulation` per step.

    limits: of waiting, as in `load_batches`.
    """
    sampler = BatchSampler(first_step, total_steps, plan, rank, world_size)
    return on_device(host_batches(crops, sampler, workers=workers, pin_memory=device.type == "cuda", **limits), device)


def host_batches(
    crops: RandomCrops, sampler: BatchSampler, *, workers: int, pin_memory: bool, **limits: float
) -> Iterator[Batch]:
    """Return the micro-batches of a sampler on the host, images channels last. Each is valid until the next is taken.

    pin_memory, limits: as in `load_batches`.
    """
    batch = sampler.plan.micro_batch
    prefetch = batches_ahead(workers, 3 * batch * crops.size**2)
    if workers:
        crops = copy.copy(crops)
        image = torch.empty(crops.size, crops.size, 3, dtype=torch.uint8).permute(2, 0, 1)  # [3, s, s], channels last
        # + 1: torch requests batch j + workers * prefetch when batch j is taken, and batch j - 1 is in use until then
        crops.slots = SharedSlots(workers * prefetch + 1, batch=batch, like=image, block=sampler.block)
    return load_batches(crops, sampler, workers=workers, prefetch=prefetch, pin_memory=pin_memory, **limits)


def batches_ahead(workers: int, batch_bytes: int) -> int:
    """Return how many batches each worker prepares in advance: as many as memory allows, from 1 to PREFETCHED."""
    return min(PREFETCHED, max(1, _MOST_BYTES // max(1, workers * batch_bytes)))
