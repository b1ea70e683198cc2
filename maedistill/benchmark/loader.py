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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from maedistill.benchmark.report import Report, Row
from maedistill.benchmark.timing import Rates, Work, interleave, ratio, spread
from maedistill.config.batch import BatchPlan
from maedistill.data.images.decode import JPEG_DECODERS, decode, open_image
from maedistill.data.images.transforms import CROP_DRAWS, Box, crop, random_box
from maedistill.data.loading.batch import Batch
from maedistill.data.loading.loader import PREFETCHED, BatchSampler, RandomCrops, host_batches
from maedistill.data.loading.order import SampleOrder
from maedistill.data.shards.index import open_index
from maedistill.errors import ConfigError
from maedistill.randomness import Stream, uniform

SEED = 0
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # MAE's
_MOST_IN_BATCH = 128
_FEWEST = 64  # fewest crops of a round: fewer give no meaningful speed
_LEAD = 16  # batches of a round per worker, if there are several: some may be made before the clock starts
DECODERS = tuple(name for name in JPEG_DECODERS if name != "pillow") or JPEG_DECODERS
PLAIN, ONE_PROCESS, STAGES = "plain loader", "ours in one process", ("read", "header", "transfer")


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
            write_folder(Path(folder), plain.data.values())
            paths = loader_paths(sampled, workers=workers)
            paths[PLAIN] = partial(_plain, Path(folder), plain, workers=workers)
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
        samples += crops.__getitems__(list(range(start, start + batch))).samples[::views].tolist()
    return Sampled(crops, batch, warm_up, steps, samples, {i: crops.reader.read(i) for i in dict.fromkeys(samples)})


def loader_paths(sampled: Sampled, *, workers: int) -> dict[str, Work]:
    """Return all paths but the plain one.

    Our loader runs with worker processes for each decoder, and in one process. The floors decode files in memory, with
    or without cropping, and discard the result. `STAGES` are the stages of our loader that can be run separately.
    """
    paths: dict[str, Work] = {ONE_PROCESS: partial(_load, sampled.crops, sampled, workers=0)}
    measured, size, read = sampled.measured, sampled.crops.size, sampled.crops.reader.read
    boxes = [sampled.boxes(i, *open_image(sampled.data[sample]).size[::-1]) for i, sample in enumerate(measured)]

    def decode_and_crop(i: int, header: Image.Image, data: bytes, *, decoder: str) -> None:
        image = decode(header, data, decoder=decoder)  # [3, H, W]
        for box in boxes[i]:
            crop(image, box, size=size)

    for name in DECODERS:
        crops = copy.copy(sampled.crops)
        crops.decoder = name
        if workers:
            paths[f"ours, {name}"] = partial(_load, crops, sampled, workers=workers)
        paths[f"decode + crop, {name}"] = _each(sampled, partial(decode_and_crop, decoder=name))
        paths[f"decode, {name}"] = _each(sampled, lambda i, header, data, name=name: decode(header, data, decoder=name))
    return paths | {
        "read": _each(sampled, lambda i, header, data: read(measured[i])),
        "header": _each(sampled, lambda i, header, data: open_image(data)),
        "transfer": partial(_load, _IdleCrops(sampled.crops), sampled, workers=1),
    }


class _IdleCrops(RandomCrops):
    """Crops that cost nothing to make, which isolates the cost of the transfer between processes."""

    def __init__(self, crops: RandomCrops) -> None:
        vars(self).update(vars(crops))

    def fill(self, images: Tensor, positions: list[int]) -> Batch:
        ids = torch.tensor(positions)
        return Batch(images, ids, ids, ids)


def _load(crops: RandomCrops, sampled: Sampled, *, workers: int) -> Iterator[int]:
    plan = BatchPlan(micro_batch=sampled.batch, accumulation=1)
    sampler = BatchSampler(0, sampled.warm_up + sampled.steps, plan=plan, rank=0, world_size=1)
    counts = (len(batch.images) for batch in host_batches(crops, sampler, workers=workers, pin_memory=False))
    yield sum(itertools.islice(counts, sampled.warm_up))
    yield from counts


def _plain(folder: Path, sampled: Sampled, *, workers: int) -> Iterator[int]:
    number = {sample: i for i, sample in enumerate(sampled.data)}  # of its file in the folder
    warm_up = max(1, workers)  # batches; the plain loader reuses no memory, so it needs fewer
    images = sampled.samples[(sampled.warm_up - warm_up) * sampled.batch // sampled.views :]
    order = [number[sample] for sample in images for _ in range(sampled.views)]
    batches = plain_batches(folder, order, size=sampled.crops.size, batch=sampled.batch, workers=workers)
    counts = (len(images) for images, _ in batches)
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
    """Write the encoded images as files of one class, in order."""
    (folder / "class").mkdir()
    for number, data in enumerate(files):
        (folder / "class" / f"{number:06d}.jpg").write_bytes(data)


def plain_batches(folder: Path, order: list[int], *, size: int, batch: int, workers: int) -> Iterator[list[Tensor]]:
    """Load as DMAE and MAE do: an image folder, Pillow, torchvision's transforms to float32, a DataLoader.

    folder: the folder that `write_folder` wrote. order: numbers of its files, in the order in which they are loaded.
    Returns an iterator over batches: images float32 [b, 3, s, s] and labels int64 [b].
    """
    crop = transforms.RandomResizedCrop(size, scale=SCALE, interpolation=InterpolationMode.BICUBIC)
    normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize])
    images = Subset(ImageFolder(str(folder), transform), order)
    context = "fork" if workers else None
    return iter(DataLoader(images, batch_size=batch, num_workers=workers, multiprocessing_context=context))


def _report(sampled: Sampled, rates: Mapping[str, Rates]) -> Report:
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
    times = {name: spread(values) for name, values in stages.items()}
    count = f"{sampled.batch * sampled.steps:,} a round after {sampled.batch * sampled.warm_up:,} to warm up"
    tables = {
        f"crops of {sampled.crops.size} px, {count}; {len(sampled.data):,} images, {sampled.views} views each": rows,
        "milliseconds of a core per crop": [{"stage": name, "ms": time} for name, time in times.items()],
    }
    return Report(tables, _remarks(sampled, {name: time.median for name, time in times.items()}))


def _remarks(sampled: Sampled, times: Mapping[str, float]) -> list[str]:
    """Name the loader's bottleneck and suggest remedies. times: by stage."""
    limit = max(times, key=times.__getitem__)
    lines = [
        f"{limit} limits: {times[limit] / sum(times.values()):.0%} of the time of a crop",
        "plain loader: Pillow and torchvision's transforms in a DataLoader; decode + crop: a loop over files in memory",
    ]
    shorter = sorted(min(open_image(data).size) for data in sampled.data.values())[len(sampled.data) // 2]
    if limit.startswith("decode") and shorter > 1.3 * sampled.crops.size:
        side = round(sampled.crops.size * 8 / 7)
        lines.append(
            f"half of the images have a shorter side of {shorter} px or more: shards made with --shorter-side {side} "
            "or data.views_per_image above 1 cost less"
        )
    if "simplejpeg" not in DECODERS:
        lines.append("simplejpeg is not installed, which decodes the same pixels: pip install simplejpeg")
    return lines
