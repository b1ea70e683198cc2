"""Load micro-batches by position: choose this rank's samples at each step, decode and crop them in worker processes.

Step s of a run with global batch B reads the positions [sB, (s+1)B). Accumulation, ranks and workers only divide them:
micro-batch j of rank r is the r-th part of the j-th block of world * m positions. So the step is all that a resumed run
needs, and the number of ranks or workers does not change which samples a step reads.

    m micro-batch   s crop size
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset

from maedistill.config.batch import BatchPlan
from maedistill.data.images.decode import JPEG_DECODERS, BadImage, decode, decode_rgb, open_image
from maedistill.data.images.transforms import CROP_DRAWS, centre_crop, crop, random_box
from maedistill.data.loading.batch import Batch
from maedistill.data.loading.order import SampleOrder
from maedistill.data.loading.prefetch import on_device
from maedistill.data.loading.shared_memory import BatchHandle, SharedBatchBuffers
from maedistill.data.loading.workers import TIMEOUT_SECONDS, load_batches
from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.reader import ShardReader, sample_name
from maedistill.errors import DataError
from maedistill.randomness import Stream, key, uniform

PREFETCHED = 4  # batches per worker
_CPU = torch.device("cpu")
_REPLACEMENTS = 16  # after this many bad samples in a row, the whole data set is considered bad


class RandomCrops(Dataset[Batch]):
    """Random crops by position. An undecodable sample is replaced by another, chosen by (seed, position) alone.

    augment: applied to each crop, uint8 [3, s, s], and its position; a pure function of the two.
    decoder: for JPEGs, one of `JPEG_DECODERS`; all give the same pixels.
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
        decoder: str = JPEG_DECODERS[0],
    ) -> None:
        self.index, self.order, self.seed = index, order, seed
        self.size, self.scale, self.ratio, self.augment = size, scale, ratio, augment
        self.decoder = decoder
        self.reader = ShardReader(index)
        self._ahead: list[int] = []  # shards of the last `read_ahead`

    def __getitems__(self, positions: list[int]) -> Batch:
        """Read one micro-batch."""
        images = torch.empty(len(positions), self.size, self.size, 3, dtype=torch.uint8)
        return self.fill(images.permute(0, 3, 1, 2), positions)

    def fill(self, images: Tensor, positions: list[int]) -> Batch:
        """Read one micro-batch into `images`, uint8 [m, 3, s, s]. Decode an image once for its consecutive views."""
        if self.reader.is_remote and (ahead := self.order.shards_ahead(positions[-1])) != self._ahead:
            self._ahead = ahead
            self.reader.read_ahead(ahead)
        at = torch.tensor(positions)
        samples = self.order.samples(at).tolist()
        draws = uniform(self.seed, at, Stream.CROP, n=CROP_DRAWS).tolist()
        bad = []
        # Group by visit, not sample: an epoch may begin with the last sample of the one before, which is another visit.
        for visit, group in itertools.groupby(range(len(positions)), key=lambda i: positions[i] // self.order.views):
            views = list(group)
            crops, sample, failed = self._crops(samples[views[0]], visit, [draws[i] for i in views])
            bad += failed
            for i, cut in zip(views, crops, strict=True):
                images[i].copy_(self.augment(cut, positions[i]) if self.augment else cut)
                samples[i] = sample
        labels = torch.from_numpy(self.index.labels[samples])  # [m]
        return Batch(images, at, labels, torch.tensor(samples), tuple(bad))

    def _crops(self, sample: int, visit: int, draws: list[list[float]]) -> tuple[list[Tensor], int, list[str]]:
        """Return a crop per row of draws, the id of the sample that was read, and the errors of the samples before it.

        If the sample cannot be decoded, read its first decodable replacement. visit: position // views, so that all
        views of an image share the replacement.
        """
        failed: list[str] = []
        for attempt in range(_REPLACEMENTS):
            try:
                return self._cut(self.reader.read(sample), draws), sample, failed
            except BadImage as error:
                failed.append(f"{sample_name(self.index, sample)}: {error}")
            word = key(self.seed, Stream.REPLACEMENT, visit, attempt)
            sample = int(self.order.ids_at(torch.tensor(word % self.order.num_images)))
        raise _all_bad(failed[-1])

    def _cut(self, data: bytes, draws: list[list[float]]) -> list[Tensor]:
        """Decode an image and return its crops, uint8 [3, s, s]. Raise `BadImage`."""
        with open_image(data) as header:
            image = decode(header, data, decoder=self.decoder)  # [3, H, W]
        height, width = image.shape[1:]
        boxes = [random_box(height, width, row, scale=self.scale, ratio=self.ratio) for row in draws]
        return [crop(image, box, size=self.size) for box in boxes]


class _CropsInSlots(Dataset[BatchHandle]):
    """The data set of the workers: batches of `crops` with images in slots of shared memory. Batch j uses slot j mod C.

    block: number of positions between the starts of two consecutive batches of a rank.
    """

    def __init__(self, crops: RandomCrops, slots: SharedBatchBuffers, *, block: int) -> None:
        self.crops, self.slots, self.block = crops, slots, block
        self.index, self.reader = crops.index, crops.reader

    def __getitems__(self, positions: list[int]) -> BatchHandle:
        """Read one micro-batch into its slot."""
        slot = positions[0] // self.block % len(self.slots)
        batch = self.crops.fill(self.slots[slot], positions)
        return BatchHandle(
            self.slots, slot, batch.positions.numpy(), batch.labels.numpy(), batch.samples.numpy(), batch.bad
        )


class CentreCrops(Dataset[tuple[Tensor, Tensor]]):
    """Centre crops of the given samples with their labels, in order, for pictures and for the kNN trend in training.

    An undecodable sample is replaced, with its label, by the next decodable one, because a probe must not end a run.
    """

    def __init__(self, index: ShardIndex, samples: Tensor, *, size: int, share: float) -> None:
        self.index, self.samples, self.size, self.share = index, samples, size, share
        self.reader = ShardReader(index)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Return images uint8 [b, 3, s, s] and labels int64 [b] of some rows of `samples`."""
        found = [self._decode(sample) for sample in self.samples[rows].tolist()]
        crops = [centre_crop(image, size=self.size, share=self.share) for image, _ in found]
        return torch.stack(crops), torch.tensor([int(self.index.labels[sample]) for _, sample in found])

    def _decode(self, sample: int) -> tuple[Tensor, int]:
        """Return the image of a sample, or of the next decodable one, and the id of that sample."""
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
    """Return the `plan.micro_batch` consecutive positions of one micro-batch of one rank."""
    block = world_size * plan.micro_batch
    start = (step * plan.accumulation + micro) * block + rank * plan.micro_batch
    return range(start, start + plan.micro_batch)


class Schedule:
    """A batch sampler for DataLoader: the positions of each micro-batch of one rank, from `first_step` on."""

    def __init__(self, first_step: int, total_steps: int, *, plan: BatchPlan, rank: int, world_size: int) -> None:
        self.steps, self.plan, self.rank, self.world_size = range(first_step, total_steps), plan, rank, world_size

    @property
    def block(self) -> int:
        """Return the number of positions between the starts of two consecutive micro-batches."""
        return self.world_size * self.plan.micro_batch

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
    max_batch_wait: float = math.inf,
) -> Iterator[Batch]:
    """Return the micro-batches of the steps [first_step, total_steps) on `device`, `plan.accumulation` per step.

    timeout_seconds, max_batch_wait: as in `load_batches`.
    """
    schedule = Schedule(first_step, total_steps, plan=plan, rank=rank, world_size=world_size)
    limits = {"timeout_seconds": timeout_seconds, "max_batch_wait": max_batch_wait}
    return on_device(host_batches(crops, schedule, workers=workers, pin_memory=device.type == "cuda", **limits), device)


def host_batches(
    crops: RandomCrops, schedule: Schedule, *, workers: int, pin_memory: bool, **limits: float
) -> Iterator[Batch]:
    """Return the micro-batches of a schedule on the host, images channels last. Each is valid until the next is taken.

    pin_memory: for copies to a GPU. limits: `timeout_seconds` and `max_batch_wait` of `load_batches`.
    """
    keywords = {"workers": workers, "batch_sampler": schedule, "pin_memory": pin_memory} | limits
    if not workers:
        return load_batches(crops, **keywords)
    # + 1: torch requests batch j + workers * PREFETCHED when batch j is taken, and batch j - 1 is in use until then
    slots = SharedBatchBuffers(workers * PREFETCHED + 1, batch=schedule.plan.micro_batch, size=crops.size)
    images = _CropsInSlots(crops, slots, block=schedule.block)
    handles = load_batches(images, prefetch_factor=PREFETCHED, **keywords)
    # With pinned memory, torch has already called `BatchHandle.pin_memory`, which opens the batch.
    return (handle.open() if isinstance(handle, BatchHandle) else handle for handle in handles)


def evaluation_batches(
    crops: CentreCrops,
    *,
    batch: int,
    workers: int,
    device: torch.device = _CPU,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return images uint8 [b, 3, s, s] and labels int64 [b] on `device`, in order. The last batch may be smaller."""
    limits = {"pin_memory": device.type == "cuda", "timeout_seconds": timeout_seconds}
    return on_device(load_batches(crops, workers=workers, batch_size=batch, **limits), device)
