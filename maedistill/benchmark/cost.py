"""Estimate the hours that a config takes, from the speeds of step and loader measured here, and find the bottleneck.

    EngineStep -> images/s of one GPU       RandomCrops on data.train -> images/s of one core
    both, and communication.py -> images/s of one GPU among many -> epochs x images -> hours

Without shards, the loader is not measured and is assumed to keep up. Without a GPU, step and loader share the cores,
and an extra table gives the time of a step on an H100 according to the model of step_model.py.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from maedistill.benchmark.communication import BANDWIDTH, AnalyticModel, on_paper
from maedistill.benchmark.engine_step import EngineStep
from maedistill.benchmark.report import Report, Row
from maedistill.benchmark.step import without_download
from maedistill.benchmark.step_model import CARD, Kind, model_step, total
from maedistill.benchmark.timing import Rates, interleave
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.loading.loader import RandomCrops
from maedistill.data.remote.cache import set_cache
from maedistill.data.shards.index import ShardIndex, open_index
from maedistill.machine import cpu_share
from maedistill.pretraining.build import build_crops
from maedistill.runs.start import join
from maedistill.training.engine import shutdown_distributed

IMAGENET_IMAGES = 1_281_167  # training images of ImageNet-1K, on which the papers train
_STEP_SECONDS = 1.0  # longest time of a step
_ROUND_SECONDS = 2.0  # time that each path runs in a round
_LOADED = 32  # images that the loader makes between two readings of the clock
_MODEL_BATCH = 256  # images of a modelled step
STEP, LOADER = "step, images/s", "loader, images/s of a core"


@dataclass(frozen=True)
class Speed:
    """The speed of one GPU of a run and of one core of its loader."""

    cluster: AnalyticModel  # includes the speed of a GPU by itself and the cost of exchanging gradients
    loader: float | None  # images per second and core; None: not measured
    cores: int  # cores that load for one GPU
    shared: bool  # True without a GPU: the cores compute the steps as well

    @property
    def step(self) -> float:
        """Return the images per second of one of the GPUs, if it never waits for data."""
        return self.cluster.images_per_second / self.cluster.ranks

    @property
    def images_per_second(self) -> float:
        """Return the speed of one GPU, including the loader's limit."""
        if self.loader is None:
            return self.step
        loaded = self.loader * self.cores
        return 1 / (1 / self.step + 1 / loaded) if self.shared else min(self.step, loaded)

    @property
    def cores_needed(self) -> float:
        """Return the number of loader cores that one GPU's step keeps busy."""
        return self.step / self.loader

    @property
    def limit(self) -> str:
        """Return the bottleneck: the part to improve first."""
        if self.loader is not None and self.loader * self.cores < self.step:
            return "loader"
        return "exchange of gradients" if self.cluster.reduce > self.cluster.compute else "step"


def expected_number(file: str) -> str | None:
    """Read the paper's result from the line `# Expected: ...` in a config's header; return None if there is no line."""
    lines = Path(file).read_text().splitlines() if Path(file).is_file() else []
    return next((line.removeprefix("# Expected: ") for line in lines if line.startswith("# Expected: ")), None)


def measure_cost(config: PretrainConfig, *, gpus: int, rounds: int, expected: str | None = None) -> Report:
    """Measure step and loader here, in turn, and estimate what the config's epochs take on `gpus` such devices.

    expected: the published result of these epochs on ImageNet-1K, with its source; None if none is known.
    Raises ConfigError if `gpus` devices cannot share the batch, DataError if the shards cannot be read.
    """
    plan = config.share_batch(gpus)
    index = _open_shards(config)
    join(config)
    try:
        step = EngineStep(config)
        if step.device.type != "cuda":
            step.autotune_batch(_STEP_SECONDS)
        paths = {STEP: _for_a_while(step)}
        if index is not None:
            paths[LOADER] = _for_a_while(_one_core(build_crops(config, index)))
        rates = interleave(paths, rounds=rounds)
        alone = rates[STEP].spread.median
        update = {"images": plan.micro_batch * plan.accumulation, "parameters": step.parameters}
        cluster = on_paper(gpus, images_per_second=alone, zero=config.engine.zero, **update)
    finally:
        shutdown_distributed()
    has_gpu = step.device.type == "cuda"
    cores = cpu_share(min(gpus, torch.cuda.device_count() or 1))
    workers = config.data.workers if config.data.workers is not None else min(8, cores)
    loader = rates[LOADER].spread.median if index is not None else None
    speed = Speed(cluster, loader, cores=min(cores, max(1, workers)) if has_gpu else cores, shared=not has_gpu)
    images = None if index is None else len(index)
    report = cost_report(config, speed, rates, batch=step.batch, images=images, to_paper=bool(expected) or not images)
    if not has_gpu:
        add_model(report, config, model_step(without_download(config), batch=_MODEL_BATCH), gpus=gpus)
    report.remarks.append(f"ImageNet-1K: {expected}" if expected else "no paper's number is known for this config")
    return report


def cost_report(
    config: PretrainConfig,
    speed: Speed,
    rates: dict[str, Rates],
    *,
    batch: int,
    images: int | None,
    to_paper: bool = True,
) -> Report:
    """Build the report's tables and remarks.

    batch: images of a measured step. images: number of images in data.train, None if it is not set. to_paper: add the
    hours on ImageNet-1K.
    """
    device, ranks = "CPU" if speed.shared else "GPU", speed.cluster.ranks
    tables: dict[str, list[Row]] = {
        f"measured, steps of {batch} images": [{"what": name, "speed": rate.spread} for name, rate in rates.items()],
        f"a run on {ranks} of this {device}": [_run_row(speed)],
        f"{config.optim.epochs:g} epochs": [
            _hours_row(name, count * config.optim.epochs, speed, device=device)
            for name, count in (("data.train", images), ("ImageNet-1K", IMAGENET_IMAGES if to_paper else None))
            if count is not None
        ],
    }
    remarks = [f"{speed.limit} limits"]
    if speed.loader is None:
        remarks.append("data.train is not named: the loader was not measured, and is taken to keep up")
    elif speed.shared:
        remarks.append(f"without a GPU, step and loader share {speed.cores} cores: their times add up")
    else:
        remarks.append(f"one GPU keeps {speed.cores_needed:.2g} loader cores busy; counted on are {speed.cores}")
    if ranks > 1:
        remarks.append(
            f"exchange of gradients: on paper, at {BANDWIDTH / 1e9:g} GB/s per {device}, assumed (communication.py)"
        )
    return Report(tables, [*remarks, "images of the steps were noise; pictures, kNN and checkpoints come on top"])


def add_model(report: Report, config: PretrainConfig, kinds: dict[str, Kind], *, gpus: int) -> None:
    """Add the modelled time of a step and of the config's epochs on GPUs that are not available here."""
    step, batch = total(kinds), _MODEL_BATCH
    rows = sorted((*kinds.items(), ("all", step)), key=lambda row: (row[0] == "all", -row[1].seconds))
    report.tables[f"an eager step of {batch} images on an {CARD}: a model, not measured"] = [
        {
            "what": name,
            "ms": f"{1e3 * kind.seconds:.1f}",
            "TFLOP": f"{kind.flops / 1e12:.2f}",
            "GB": f"{kind.bytes / 1e9:.1f}",
            "kernels": kind.kernels,
        }
        for name, kind in rows
    ]
    rate = batch / step.seconds
    hours = config.optim.epochs * IMAGENET_IMAGES / rate / 3600
    report.remarks.append(
        f"the model's {CARD}: {rate:,.0f} images/s, {step.flops / step.seconds / 1e12:.0f} TFLOP/s; {hours:,.1f} "
        f"GPU-hours for {config.optim.epochs:g} epochs of ImageNet-1K, {hours / gpus:,.1f} hours on {gpus}, with "
        "loaders that keep up and no exchange of gradients"
    )


def _run_row(speed: Speed) -> Row:
    """Return the row for one device of the run."""
    cluster = speed.cluster
    return {
        "images/s of each": round(speed.images_per_second, 1),
        "images per update of each": cluster.images,
        "gradients' share of a step": f"{1 - cluster.efficiency:.1%}",
        "loader cores to keep up": "-" if speed.loader is None else f"{speed.cores_needed:.2g}",
        "limit": speed.limit,
    }


def _hours_row(name: str, images: float, speed: Speed, *, device: str) -> Row:
    hours = images / speed.images_per_second / 3600
    return {
        "data": name,
        "images": round(images),
        f"{device}-hours": hours,
        f"hours on {speed.cluster.ranks}": hours / speed.cluster.ranks,
    }


def _open_shards(config: PretrainConfig) -> ShardIndex | None:
    """Open the index of data.train; return None if data.train is not set."""
    if not config.data.train:
        return None
    set_cache(folder=config.data.cache_folder, gigabytes=config.data.cache_gb)
    return open_index(config.data.train, index=config.data.index)


def _one_core(crops: RandomCrops) -> Callable[[], int]:
    """Return a function that loads the next images of the run on one core, as a loader process does."""
    position = 0

    def load() -> int:
        nonlocal position
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        crops.__getitems__(list(range(position, position + count)))
        torch.set_num_threads(threads)
        position += count
        return count

    views = crops.order.views
    count = -(-_LOADED // views) * views
    return load


def _for_a_while(work: Callable[[], int]) -> Callable[[], int]:
    """Return a function that repeats `work` for `_ROUND_SECONDS`."""

    def repeated() -> int:
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < _ROUND_SECONDS:
            images += work()
        return images

    return repeated
