"""The speed of our loader, of the plain one, and of the floor, a loop that only decodes and crops.

    shards -> Sampled -> {path: a generator of the crops it has made} -> interleave -> tables, remarks

Each round of a path starts new processes, so that none of them works while another path is measured. The clocks start
after some batches have arrived, so they count neither the start nor the first use of memory. All paths are measured on
the same crops. The files are in the page cache, and torch has one thread.

Ratios and stages use core-seconds, because other load on the machine lengthens wall-clock time by a random amount.

    m images in a batch   s crop size
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from maedistill.benchmark.report import Report, Row
from maedistill.benchmark.timing import Rates, Work, interleave, ratio, spread
from maedistill.config.plan import BatchPlan
from maedistill.data.images.decode import JPEG_DECODERS, decode, decode_rgb, open_image
from maedistill.data.images.shared_images import KeptImages, table_bytes
from maedistill.data.images.transforms import CROP_DRAWS, Box, crop, random_box
from maedistill.data.loading.batch import Batch
from maedistill.data.loading.dataset import open_reader
from maedistill.data.loading.loader import PREFETCHED, BatchSampler, RandomCrops, host_batches
from maedistill.data.loading.order import SampleOrder
from maedistill.data.shards.open_index import open_index
from maedistill.errors import ConfigError
from maedistill.randomness import Stream, uniform

SEED = 0
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # MAE's
_MOST_IN_BATCH = 128
_FEWEST = 64  # fewest crops of a round: fewer give no meaningful speed
_LEAD = 16  # batches of a round per worker, if there are several: some may be made before the clock starts
DECODERS = tuple(name for name in JPEG_DECODERS if name != "pillow") or JPEG_DECODERS
PLAIN, ONE_PROCESS, KEPT, STAGES = "plain loader", "ours in one process", "ours, kept", ("read", "header", "transfer")


@dataclass(frozen=True)
class Sampled:
    """The input of all paths: the crops of some measured batches of a run, preceded by a few warm-up batches."""

    crops: RandomCrops
    batch: int  # crops in a batch
    warm_up: int  # number of warm-up batches
    steps: int  # number of measured batches
    samples: list[int]  # sample id of each decoded image, warm-up included
    data: dict[int, bytes]  # sample id -> its file

    @property
    def views(self) -> int:
        """Return the number of crops per decoded image."""
        return self.crops.order.views

    @property
    def measured(self) -> list[int]:
        """Return the sample ids of the measured batches."""
        return self.samples[self.warm_up * self.batch // self.views :]

    def boxes(self, image: int, height: int, width: int) -> list[Box]:
        """Return the crop boxes of the measured image number `image`."""
        at = self.warm_up * self.batch + torch.arange(image * self.views, (image + 1) * self.views)
        rows = uniform(SEED, at, Stream.CROP, n=CROP_DRAWS).tolist()
        return [random_box(height, width, row, scale=SCALE, ratio=RATIO) for row in rows]


def measure_loader(
    shards: str, *, size: int, views: int, workers: int, images: int, rounds: int, against: str | None = None
) -> Report:
    """Measure all paths available on this machine, with `images` crops of `size` pixels per round.

    views: crops per decoded image. workers: loader processes; 0 loads in this process. against: shards that the plain
    path reads instead, such as the originals from which `shards` were shrunk.
    Raises ConfigError if `workers` is negative or `images` too few.
    """
    if workers < 0:
        raise ConfigError(f"--workers is {workers}", "give 0 for this process alone, or more")
    if images < _FEWEST:
        raise ConfigError(f"--images: {images} are too few to measure", f"give {_FEWEST} or more")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory(prefix="maedistill-") as folder:
            sampled = sample(shards, size=size, views=views, workers=workers, images=images)
            plain = sample(against, size=size, views=views, workers=workers, images=images) if against else sampled
            warm_up = max(1, workers)  # batches; the plain loader reuses no memory, so it needs fewer than ours
            first = (plain.warm_up - warm_up) * plain.batch // views
            write_folder(Path(folder), [plain.data[i] for i in plain.samples[first:] for _ in range(views)])
            paths = loader_paths(sampled, workers=workers)
            load = partial(plain_batches, Path(folder), size=size, batch=plain.batch, workers=workers)
            paths[PLAIN] = partial(_counts, load, warm_up=warm_up)
            rates = interleave(paths, rounds=rounds)
    finally:
        torch.set_num_threads(threads)
    return _report(sampled, rates)


def sample(shards: str, *, size: int, views: int, workers: int, images: int) -> Sampled:
    """Draw the crops to measure and read their files; undecodable samples are replaced, as in a run.

    A single worker waits until its batches are taken. Several workers may be a batch ahead when the clock starts, so a
    round then has many batches and more crops than `images`.
    """
    batch = max(1, min(_MOST_IN_BATCH, images // (2 * max(1, workers))) // views) * views
    warm_up, steps = max(1, workers) * PREFETCHED + 1, -(-images // batch)
    if workers > 1:
        steps = max(steps, _LEAD * workers)
    index = open_index(shards)
    order = SampleOrder(index.starts, seed=SEED, views=views)
    crops = RandomCrops(index, order, seed=SEED, size=size, scale=SCALE, ratio=RATIO)
    samples: list[int] = []
    for start in range(0, batch * (warm_up + steps), batch):
        read = crops.__getitems__(list(range(start, start + batch)))
        assert isinstance(read, Batch)
        samples += read.samples[::views].tolist()
    return Sampled(crops, batch, warm_up, steps, samples, {i: crops.reader.read(i) for i in dict.fromkeys(samples)})


def loader_paths(sampled: Sampled, *, workers: int) -> dict[str, Work]:
    """Return all paths but the plain one.

    Our loader runs with worker processes for each decoder, and in one process. The floors decode files in memory, with
    or without cropping, and discard the result. `STAGES` are the stages of our loader that can be run separately.
    """
    plan = BatchPlan(micro_batch=sampled.batch, accumulation=1)
    sampler = BatchSampler(0, sampled.warm_up + sampled.steps, plan=plan, rank=0, world_size=1)

    def ours(crops: RandomCrops, *, workers: int) -> Work:
        load = partial(host_batches, crops, sampler, workers=workers, pin_memory=False)
        return partial(_counts, load, warm_up=sampled.warm_up)

    paths = {ONE_PROCESS: ours(sampled.crops, workers=0), KEPT: ours(_kept(sampled), workers=workers)}
    measured, size, read = sampled.measured, sampled.crops.size, sampled.crops.reader.read
    boxes = [sampled.boxes(i, *open_image(sampled.data[sample]).size[::-1]) for i, sample in enumerate(measured)]

    def floor(i: int, header: Image.Image, data: bytes, *, decoder: str, crops: bool) -> None:
        image = decode(header, data, decoder=decoder)  # [3, H, W]
        for box in boxes[i] if crops else ():
            crop(image, box, size=size)

    for name in DECODERS:
        crops = copy.copy(sampled.crops)
        crops.decoder = name
        if workers:
            paths[f"ours, {name}"] = ours(crops, workers=workers)
        paths[f"decode + crop, {name}"] = _each(sampled, partial(floor, decoder=name, crops=True))
        paths[f"decode, {name}"] = _each(sampled, partial(floor, decoder=name, crops=False))
    idle = copy.copy(sampled.crops)
    idle.__class__ = _IdleCrops
    return paths | {
        "read": _each(sampled, lambda i, header, data: read(measured[i])),
        "header": _each(sampled, lambda i, header, data: open_image(data)),
        "transfer": ours(idle, workers=1),
    }


def _kept(sampled: Sampled) -> RandomCrops:
    """Return the crops of images that lie decoded in memory, as `data.keep_decoded` leaves them after an epoch."""
    crops, count = copy.copy(sampled.crops), len(sampled.crops.index)
    pixels = sum(3 * image.width * image.height for image in map(open_image, sampled.data.values()))
    crops.reader = open_reader(crops.index)
    crops.reader.kept = KeptImages.create(count, table_bytes(count) + pixels)
    for sample, data in sampled.data.items():
        crops.reader.kept.put(sample, decode_rgb(data))
    return crops


class _IdleCrops(RandomCrops):
    """Crops that cost nothing to make, which isolates the cost of the transfer between processes."""

    def fill(self, images: Tensor, positions: list[int]) -> Batch:
        ids = torch.tensor(positions)
        return Batch(images, ids, ids, ids)


def _counts(load: Callable[[], Iterable[Sequence[Any]]], *, warm_up: int) -> Iterator[int]:
    """Load all batches, whose first tensor holds the images, and count the images of the first `warm_up` together."""
    counts = (len(batch[0]) for batch in load())
    yield sum(itertools.islice(counts, warm_up))
    yield from counts


def _each(sampled: Sampled, work: Callable[[int, Image.Image, bytes], object]) -> Work:
    """Return the path that does `work` for each measured image: its number, its header opened before, its file."""

    def path() -> Iterator[int]:
        files = [sampled.data[i] for i in sampled.measured]
        headers = [open_image(data) for data in files]
        yield 0
        for i, (header, data) in enumerate(zip(headers, files, strict=True)):
            work(i, header, data)
            yield sampled.views

    return path


def write_folder(folder: Path, files: Iterable[bytes]) -> None:
    """Write the encoded images as files of one class, in the order in which they are loaded."""
    (folder / "class").mkdir()
    for number, data in enumerate(files):
        (folder / "class" / f"{number:06d}.jpg").write_bytes(data)


def plain_batches(folder: Path, *, size: int, batch: int, workers: int) -> Iterable[Sequence[Tensor]]:
    """Load as DMAE and MAE do: an image folder, Pillow, torchvision's transforms to float32, a DataLoader.

    folder: the folder that `write_folder` wrote. Returns batches: images float32 [b, 3, s, s], labels int64 [b].
    """
    crop = transforms.RandomResizedCrop(size, scale=SCALE, interpolation=InterpolationMode.BICUBIC)
    normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize])
    images, context = ImageFolder(str(folder), transform), "fork" if workers else None
    return DataLoader(images, batch_size=batch, num_workers=workers, multiprocessing_context=context)


def _report(sampled: Sampled, rates: Mapping[str, Rates]) -> Report:
    """Compare the paths, split a crop's time into stages, name the bottleneck and suggest remedies."""
    per_core = {name: rate.per_core for name, rate in rates.items()}
    rows: list[Row] = []
    for name in (name for name in rates if name not in STAGES):
        decoder = name.rpartition(", ")[2]
        floor = f"decode + crop, {decoder if decoder in DECODERS else DECODERS[0]}"
        speeds = {"per second": spread(rates[name].wall), "per core-second": spread(per_core[name])}
        ratios = {"x plain": ratio(per_core[name], per_core[PLAIN])}
        ratios["x decode + crop"] = ratio(per_core[name], per_core[floor])
        rows.append({"path": name, **speeds, **ratios})
    # Stages without a path of their own are differences within a round.
    ms = {name: 1000 / np.array(rounds) for name, rounds in per_core.items()}  # [rounds] each
    decoded, both = ms[f"decode, {DECODERS[0]}"], ms[f"decode + crop, {DECODERS[0]}"]
    collate = ms[ONE_PROCESS] - both - ms["read"] - ms["header"]
    stages = {"read": ms["read"], "header": ms["header"], f"decode ({DECODERS[0]})": decoded, "crop": both - decoded}
    stages |= {"collate": collate, "transfer to the training process": ms["transfer"]}
    times = {name: spread(values.tolist()) for name, values in stages.items()}
    count = f"{sampled.batch * sampled.steps:,} a round after {sampled.batch * sampled.warm_up:,} to warm up"
    size = sampled.crops.size
    tables: dict[str, list[Row]] = {
        f"crops of {size} px, {count}; {len(sampled.data):,} images, {sampled.views} views each": rows,
        "milliseconds of a core per crop": [{"stage": name, "ms": time} for name, time in times.items()],
    }
    decoding = f"ours, {DECODERS[0]}" if f"ours, {DECODERS[0]}" in rates else ONE_PROCESS
    medians = {name: time.median for name, time in times.items()}
    limit = max(medians, key=medians.__getitem__)
    remarks = [
        f"{limit} limits: {medians[limit] / sum(medians.values()):.0%} of the time of a crop",
        "plain loader: Pillow and torchvision's transforms in a DataLoader; decode + crop: a loop over files in memory",
        f"kept: images that lie decoded in memory, as data.keep_decoded leaves them after the first epoch: "
        f"{ratio(per_core[KEPT], per_core[decoding])} x {decoding}",
    ]
    shorter = sorted(min(open_image(data).size) for data in sampled.data.values())[len(sampled.data) // 2]
    if limit.startswith("decode") and shorter > 1.3 * size:
        remarks.append(
            f"half of the images have a shorter side of {shorter} px or more: shards made with --shorter-side "
            f"{round(size * 8 / 7)} or data.views_per_image above 1 cost less"
        )
    if "simplejpeg" not in DECODERS:
        remarks.append("simplejpeg is not installed, which decodes the same pixels: pip install simplejpeg")
    return Report(tables, remarks)
