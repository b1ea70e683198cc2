"""The speed of our loader, of the plain one, and of the floor, a loop that only decodes and crops.

    shards -> Sampled -> {path: a generator of the crops it has made} -> measure, in turn -> tables, remarks

Each round of a path starts new processes, so that none of them works while another path is measured. The clocks start
after some batches have arrived, so they count neither the start nor the first use of memory. All paths are measured on
the same crops. The files are in the page cache, and torch has one thread.

Ratios and stages use core-seconds, because other load on the machine lengthens wall-clock time by a random amount.

    m images in a batch   s crop size
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from maedistill.benchmark.plain_loader import plain_batches, write_folder
from maedistill.benchmark.report import Report, Row
from maedistill.benchmark.speed import Speed, Work, measure
from maedistill.benchmark.timing import Rates, Spread, ratio, spread
from maedistill.config.batch import BatchPlan
from maedistill.data.images.decode import JPEG_DECODERS, decode, open_image
from maedistill.data.images.transforms import CROP_DRAWS, Box, crop, random_box
from maedistill.data.loading.batch import Batch
from maedistill.data.loading.loader import PREFETCHED, RandomCrops, Schedule, host_batches
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


@dataclass
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

    @property
    def files(self) -> list[bytes]:
        """Return the file of each measured image."""
        return [self.data[sample] for sample in self.measured]

    def variant(self, kind: type[RandomCrops] = RandomCrops, **options: object) -> RandomCrops:
        """Return a loader of the same crops with another class or other options."""
        return kind(
            self.crops.index, self.crops.order, seed=SEED, size=self.crops.size, scale=SCALE, ratio=RATIO, **options
        )

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
            paths = loader_paths(sampled, workers=workers) | floor_paths(sampled)
            paths["plain loader"] = functools.partial(_plain, Path(folder), plain, workers=workers)
            stages = stage_paths(sampled)
            speeds = measure(paths | stages, rounds=rounds)
    finally:
        torch.set_num_threads(threads)
    return _report(sampled, {name: speeds[name] for name in paths}, {name: speeds[name].per_core for name in stages})


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
    """Return the paths of our loader: with worker processes for each decoder, and in one process."""
    paths = {f"ours, {name}": sampled.variant(decoder=name) for name in DECODERS if workers}
    loads = {name: functools.partial(_load, crops, sampled, workers=workers) for name, crops in paths.items()}
    return loads | {"ours in one process": functools.partial(_load, sampled.crops, sampled, workers=0)}


def floor_paths(sampled: Sampled) -> dict[str, Work]:
    """Return loops over files in memory that decode, with or without cropping, and discard the result."""
    paths = {}
    for name in DECODERS:
        paths[f"decode + crop, {name}"] = functools.partial(_floor, sampled, decoder=name, crops=True)
        paths[f"decode, {name}"] = functools.partial(_floor, sampled, decoder=name, crops=False)
    return paths


def stage_paths(sampled: Sampled) -> dict[str, Work]:
    """Return the stages of our loader that can be run separately."""
    idle = sampled.variant(_Idle)
    return {
        "read": functools.partial(_read, sampled),
        "header": functools.partial(_header, sampled),
        "transfer": functools.partial(_load, idle, sampled, workers=1),
    }


class _Idle(RandomCrops):
    """Crops that cost nothing to make, which isolates the cost of the transfer between processes."""

    def fill(self, images: Tensor, positions: list[int]) -> Batch:
        ids = torch.tensor(positions)
        return Batch(images, ids, ids, ids)


def _load(crops: RandomCrops, sampled: Sampled, *, workers: int) -> Iterator[int]:
    plan = BatchPlan(micro_batch=sampled.batch, accumulation=1)
    schedule = Schedule(0, sampled.warm_up + sampled.steps, plan=plan, rank=0, world_size=1)
    batches = host_batches(crops, schedule, workers=workers, pin_memory=False)
    yield from _without_warm_up((len(batch.images) for batch in batches), sampled.warm_up)


def _plain(folder: Path, sampled: Sampled, *, workers: int) -> Iterator[int]:
    number = {sample: i for i, sample in enumerate(sampled.data)}
    warm_up = max(1, workers)  # batches; the plain loader reuses no memory, so it needs fewer
    images = sampled.samples[(sampled.warm_up - warm_up) * sampled.batch // sampled.views :]
    order = [number[sample] for sample in images for _ in range(sampled.views)]
    keywords = {"size": sampled.crops.size, "scale": SCALE, "batch": sampled.batch, "workers": workers}
    batches = plain_batches(folder, order, **keywords)
    yield from _without_warm_up((len(images) for images, _ in batches), warm_up)


def _without_warm_up(parts: Iterator[int], count: int) -> Iterator[int]:
    """Yield the sum of the first `count` parts, after which the measurement starts, then the other parts."""
    yield sum(itertools.islice(parts, count))
    yield from parts


def _floor(sampled: Sampled, *, decoder: str, crops: bool) -> Iterator[int]:
    headers = [open_image(data) for data in sampled.files]
    boxes = [sampled.boxes(i, header.height, header.width) for i, header in enumerate(headers)]
    yield 0
    for header, data, views in zip(headers, sampled.files, boxes, strict=True):
        image = decode(header, data, decoder=decoder)  # [3, H, W]
        for box in views if crops else ():
            crop(image, box, size=sampled.crops.size)
        yield len(views)


def _read(sampled: Sampled) -> Iterator[int]:
    yield 0
    for image in sampled.measured:
        sampled.crops.reader.read(image)
        yield sampled.views


def _header(sampled: Sampled) -> Iterator[int]:
    yield 0
    for data in sampled.files:
        open_image(data)
        yield sampled.views


def _report(sampled: Sampled, paths: Mapping[str, Speed], stages: Mapping[str, Rates]) -> Report:
    per_core = {name: speed.per_core for name, speed in paths.items()}
    stage_times = _stage_times(per_core, stages)
    views = f", {sampled.views} views each" if sampled.views > 1 else ""
    count = f"{sampled.batch * sampled.steps:,} a round after {sampled.batch * sampled.warm_up:,} to warm up"
    tables = {
        f"crops of {sampled.crops.size} px, {count}; {len(sampled.data):,} images{views}": [
            {"path": name, "per second": speed.wall.spread} | _compared(name, per_core) for name, speed in paths.items()
        ],
        "milliseconds of a core per crop": [{"stage": name, "ms": time} for name, time in stage_times.items()],
    }
    return Report(tables, _remarks(sampled, stage_times))


def _compared(name: str, per_core: Mapping[str, Rates]) -> Row:
    """Compare a path with the plain loader, and with the decode-and-crop loop that uses the same decoder."""
    floor = per_core.get(f"decode + crop, {name.rpartition(', ')[2]}", per_core[f"decode + crop, {DECODERS[0]}"])
    return {
        "per core-second": per_core[name].spread,
        "x plain": ratio(per_core[name], per_core["plain loader"]),
        "x decode + crop": ratio(per_core[name], floor),
    }


def _stage_times(paths: Mapping[str, Rates], stages: Mapping[str, Rates]) -> dict[str, Spread]:
    """Return the milliseconds per crop of each stage. Stages without their own loop are differences within a round."""
    ms = {name: 1000 / np.array(rates.rounds) for name, rates in (paths | stages).items()}  # [rounds] each
    decode, both = ms[f"decode, {DECODERS[0]}"], ms[f"decode + crop, {DECODERS[0]}"]
    collate = ms["ours in one process"] - both - ms["read"] - ms["header"]
    parts = {"read": ms["read"], "header": ms["header"], f"decode ({DECODERS[0]})": decode, "crop": both - decode}
    parts |= {"collate": collate, "transfer to the training process": ms["transfer"]}
    return {name: spread(tuple(times.tolist())) for name, times in parts.items()}


def _remarks(sampled: Sampled, stage_times: Mapping[str, Spread]) -> list[str]:
    """Name the loader's bottleneck and suggest remedies."""
    times = {name: time.median for name, time in stage_times.items()}
    most = max(times, key=times.__getitem__)
    lines = [
        f"{most} limits: {times[most] / sum(times.values()):.0%} of the time of a crop",
        "plain loader: PIL, RandomResizedCrop (bicubic), flip, ToTensor, Normalize in a DataLoader over a folder; "
        "decode + crop: a loop over the files in memory, the floor",
    ]
    shorter = sorted(min(open_image(data).size) for data in sampled.data.values())[len(sampled.data) // 2]
    if most.startswith("decode") and shorter > 1.3 * sampled.crops.size:
        side = round(sampled.crops.size * 8 / 7)
        lines.append(
            f"half of the images have a shorter side of {shorter} px or more: shards made with --shorter-side {side} "
            "or data.views_per_image above 1 cost less"
        )
    if "simplejpeg" not in DECODERS:
        lines.append("simplejpeg is not installed, which decodes the same pixels: pip install simplejpeg")
    return lines
