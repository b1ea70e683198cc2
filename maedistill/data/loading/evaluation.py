"""Exact evaluation input: every image once, none replaced, each preprocessed as in timm's validate.py.

    index, sample ids -> rank_share -> EvaluationImages -> exact_batches -> images, labels, ids

An image that cannot be decoded is marked and left out, never replaced: an accuracy says how many images it covers.

    n samples   b batch   s image side
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, create_transform
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from maedistill.data.images.decode import BadImage, decode_rgb
from maedistill.data.loading.batch import BatchHandle, SharedSlots, on_device
from maedistill.data.loading.dataset import open_reader
from maedistill.data.loading.workers import TIMEOUT_SECONDS, Images, load_batches
from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.scan import NO_LABEL

_CPU = torch.device("cpu")
LONGEST_ASPECT = 32  # longer side / shorter side; below it, pixels are exactly timm's
PREFETCHED = 2  # batches per worker
PADDING = -1  # instead of a sample id: a black image without label; so is `undecodable(id)`


def undecodable(ids: Any) -> Any:
    """Map an id to the negative number that marks it as undecodable, and back: it is its own inverse."""
    return PADDING - 1 - ids


def evaluation_transform(
    *,
    size: int | tuple[int, int],
    crop: float,
    interpolation: str = "bicubic",
    crop_mode: str = "center",
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
) -> Callable[[Image.Image], Tensor]:
    """Return timm's evaluation transform without the normalisation: RGB image -> uint8 [3, s, s].

    size: side, or height and width. crop: share of the shorter side that is kept (timm's crop_pct).
    interpolation, crop_mode: as in a timm model's data config. mean: the padding value of the mode `border`.
    """
    transform = create_transform(
        size, crop_pct=crop, interpolation=interpolation, crop_mode=crop_mode, mean=mean, normalize=False
    )
    if crop_mode == "squash":
        return transform
    return lambda image: transform(without_far_ends(image))


def without_far_ends(image: Image.Image) -> Image.Image:
    """Cut an image that is more than 32 times as long as it is wide to its middle; return others as they are.

    timm resizes the whole image before it crops: one of 60,000 x 1 pixels, a file of 259 bytes, would take 15 GB. A
    centre crop shows nothing of the ends.
    """
    width, height = image.size
    most = LONGEST_ASPECT * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


@dataclass(eq=False, repr=False)
class EvaluationImages(Images):
    """The given samples, int64 [n], in order, each with its label and id.

    `PADDING`, and an image that cannot be decoded, gives a black image without label.
    """

    index: ShardIndex
    samples: Tensor
    transform: Callable[[Image.Image], Tensor]

    def __post_init__(self) -> None:
        self.reader = open_reader(self.index)
        self.slots: SharedSlots | None = None  # None: each batch has memory of its own
        self.black = torch.zeros_like(self.transform(Image.new("RGB", (1, 1)))).contiguous()  # [3, s, s]

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return images uint8 [b, 3, s, s], labels and sample ids int64 [b] of some rows of `samples`.

        The label of an unlabelled sample is -1, the id of an image that cannot be decoded `undecodable(id)`.
        """
        ids = self.samples[rows]  # [b]
        slot = self.slots.slot_of(rows[0]) if self.slots else 0
        images = self.slots.images[slot] if self.slots else self.black.new_empty(len(rows), *self.black.shape)
        for i, sample in enumerate(ids.tolist()):
            try:
                images[i].copy_(self.black if sample == PADDING else self._image(sample))
            except BadImage:
                images[i].copy_(self.black)
                ids[i] = undecodable(sample)
        labels = torch.from_numpy(self.index.labels[ids.clamp(min=0).numpy()]).masked_fill(ids < 0, NO_LABEL)  # [b]
        if self.slots:  # in a loader worker: the handle is a tuple again where it arrives
            return cast(Any, BatchHandle(self.slots, slot, _copied, (labels, ids)))
        return images, labels, ids

    def with_samples(self, samples: Tensor) -> "EvaluationImages":
        """Return the same view of other samples."""
        return replace(self, samples=samples)

    def why_bad(self, sample: int) -> str:
        """Name a sample that could not be decoded, and say why."""
        try:
            self._image(sample)
        except BadImage as error:
            return f"{self.index.sample_name(sample)} ({error})"
        return self.index.sample_name(sample)

    def _image(self, sample: int) -> Tensor:
        decode = partial(decode_rgb, apply_exif=self.index.apply_exif)
        return self.transform(vision.to_pil_image(self.reader.decoded(sample, decode)))


def _copied(images: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copy a batch out of its slot, so that it is valid as long as it is kept."""
    return images[: len(ids)].clone(), labels, ids


def exact_batches(
    images: EvaluationImages,
    *,
    batch: int,
    workers: int,
    device: torch.device = _CPU,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Return images uint8 [b, 3, s, s], labels, ids int64 [b] on `device`, in order. The last batch may be smaller."""
    count = len(images.samples)
    if workers:  # torch would make a file in /dev/shm of each batch, which containers give 64 MB
        images = copy.copy(images)
        batch = min(batch, count)
        images.slots = SharedSlots(workers * PREFETCHED + 1, batch=batch, like=images.black, block=batch)
    rows = (list(range(start, min(start + batch, count))) for start in range(0, count, batch))
    pin_memory = device.type == "cuda"
    batches = load_batches(
        images, rows, workers=workers, prefetch=PREFETCHED, pin_memory=pin_memory, timeout_seconds=timeout_seconds
    )
    return on_device(batches, device)


def rank_share(samples: Tensor, *, rank: int, world_size: int) -> Tensor:
    """Return every world_size-th sample, starting at `rank`: int64 [n] -> int64 [ceil(n / world_size)].

    All ranks get the same number of samples, with `PADDING` at the end where samples are missing, because ZeRO 3 needs
    the same number of forward passes on every rank.
    """
    padding = samples.new_full((-len(samples) % world_size,), PADDING)
    return torch.cat([samples, padding])[rank::world_size]
