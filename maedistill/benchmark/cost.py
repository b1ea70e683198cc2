"""Estimate the hours that a config takes, from the speeds of step and loader measured here, and find the bottleneck.

    engine step -> images/s of one GPU       RandomCrops on data.train -> images/s of one core
    both, and the exchange of gradients -> AnalyticModel -> epochs x images -> hours

Without shards, the loader is not measured and is assumed to keep up. Without a GPU, step and loader share the cores,
and an extra table gives the time of a step on an H100 according to the model of step_model.py.

The exchange is modelled: a ring in which each of K ranks sends 2 (K - 1) / K times the gradients, 4 bytes each (ZeRO 3:
3 (K - 1) / K, because it gathers the weights twice), at `BANDWIDTH`, after the backward pass. The engine overlaps the
two; latency, stragglers and the file system cost nothing here.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from maedistill.benchmark.report import Report, Row
from maedistill.benchmark.step_model import CARD, Kind, model_step
from maedistill.benchmark.timing import Rates, interleave, repeated, spread
from maedistill.benchmark.training_step import SyntheticTraining
from maedistill.config.auto import with_numbers
from maedistill.config.document import find_config
from maedistill.config.keys import differing_keys
from maedistill.config.loader import load_config
from maedistill.config.plan import share_batch
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.loading.decoded_cache import room_for
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.scan import Members
from maedistill.machine import cpu_share, loader_workers
from maedistill.pretraining.build import build_crops
from maedistill.processes import distributed
from maedistill.runs.start import join
from maedistill.training.engine import shutdown_distributed

BANDWIDTH = 25e9  # bytes per second and rank, in each direction: one 200 Gbit/s network port per GPU
IMAGENET_IMAGES = 1_281_167  # training images of ImageNet-1K, on which the papers train
_ROUND_SECONDS = 2.0  # time that each path runs in a round
_LOADED = 32  # images that the loader makes at once
_OF_THE_FILES = {"data.image_key", "data.label_key"}  # result keys that say how shards are read
_MODEL_BATCH = 256  # images of a modelled step
STEP, LOADER = "step, images/s", "loader, images/s of a core"


@dataclass(frozen=True)
class AnalyticModel:
    """The modelled speed of a run: seconds of computation and of exchange per update, and what the loaders deliver."""

    ranks: int
    images: int  # per rank and update
    compute: float
    exchange: float
    loader: float = math.inf  # images per second of one core; infinite if not measured
    cores: int = 1  # that load for one rank
    shared: bool = False  # True without a GPU: these cores compute the steps as well

    @property
    def efficiency(self) -> float:
        """Return the speed relative to the same number of ranks without communication."""
        return self.compute / (self.compute + self.exchange)

    @property
    def step(self) -> float:
        """Return the images per second of one rank, if it never waits for data."""
        return self.images / (self.compute + self.exchange)

    @property
    def images_per_second(self) -> float:
        """Return the images per second of one rank, including the loader's limit."""
        loaded = self.loader * self.cores
        return 1 / (1 / self.step + 1 / loaded) if self.shared else min(self.step, loaded)

    @property
    def limit(self) -> str:
        """Return the bottleneck: the part to improve first."""
        if self.loader * self.cores < self.step:
            return "loader"
        return "exchange of gradients" if self.exchange > self.compute else "step"


def exchange_seconds(ranks: int, parameters: int, *, zero: int) -> float:
    """Model the exchange of the gradients of an update, as described above. zero: the ZeRO stage."""
    return (3 if zero == 3 else 2) * (ranks - 1) / ranks * 4 * parameters / BANDWIDTH


def expected_number(file: str, config: PretrainConfig) -> str | None:
    """Read the paper's result from the line `# Expected: ...` in the header of a config's file.

    Return None if there is no line, or if `config` changes a setting of the file on which results depend.
    """
    lines = find_config(file).read_text().splitlines()
    expected = next((line.removeprefix("# Expected: ") for line in lines if line.startswith("# Expected: ")), None)
    if expected is None:
        return None
    changes = differing_keys(load_config(file, root=PretrainConfig, to_run=False).config, config)
    return expected if {key for key, *_ in changes} <= _OF_THE_FILES else None


def measure_cost(config: PretrainConfig, *, gpus: int, rounds: int, expected: str | None = None) -> Report:
    """Measure step and loader here, in turn, and estimate what the config's epochs take on `gpus` such devices.

    expected: the published result of these epochs on ImageNet-1K, with its source; None if none is known.
    Raises ConfigError if `gpus` devices cannot share the batch, DataError if the shards cannot be read.
    """
    data, index = config.data, None
    if data.train:
        index = open_index(data.train, index=data.index, members=Members(data.image_key, data.label_key))
    config = with_numbers(config, len(index) if index is not None else IMAGENET_IMAGES, world_size=gpus)
    plan = share_batch(config, gpus)
    join(config)
    try:
        training = SyntheticTraining(config, distributed.device())
        step, has_gpu = training.engine_step(), training.device.type == "cuda"
        if not has_gpu:
            training.autotune_batch(step)
        paths = {STEP: repeated(step, training.device, images=training.batch, seconds=_ROUND_SECONDS)}
        if index is not None:
            count = -(-_LOADED // data.views_per_image) * data.views_per_image
            crops, starts = build_crops(config, index), itertools.count(step=count)

            def load() -> None:
                """Load the next `count` images of the run on one core, as a loader process does."""
                threads, start = torch.get_num_threads(), next(starts)
                torch.set_num_threads(1)
                crops.__getitems__(list(range(start, start + count)))
                torch.set_num_threads(threads)

            paths[LOADER] = repeated(load, torch.device("cpu"), images=count, seconds=_ROUND_SECONDS)
        rates = interleave(paths, rounds=rounds)
    finally:
        shutdown_distributed()
    images, cores = plan.micro_batch * plan.accumulation, cpu_share(min(gpus, torch.cuda.device_count() or 1))
    model = AnalyticModel(
        gpus,
        images,
        compute=images / spread(rates[STEP].wall).median,
        exchange=exchange_seconds(gpus, training.num_parameters, zero=config.engine.zero),
        loader=spread(rates[LOADER].wall).median if index is not None else math.inf,
        cores=min(cores, max(1, loader_workers(data.workers, cores))) if has_gpu else cores,
        shared=not has_gpu,
    )
    sizes = {} if index is None else {"data.train": len(index)}
    if expected or not sizes:
        sizes["ImageNet-1K"] = IMAGENET_IMAGES
    report = cost_report(config, model, rates, batch=training.batch, sizes=sizes)
    if not has_gpu:
        _add_card(report, config, model)
    if index is not None and (room := room_for(crops, data.keep_decoded)) is not None and room.is_enough:
        report.remarks.append("the loader decoded each image; a run keeps these (data.keep_decoded) and then is faster")
    report.remarks.append(f"ImageNet-1K: {expected}" if expected else "no paper's number is known for these settings")
    return report


def cost_report(
    config: PretrainConfig, model: AnalyticModel, rates: Mapping[str, Rates], *, batch: int, sizes: Mapping[str, int]
) -> Report:
    """Build the report's tables and remarks.

    batch: images of a measured step. sizes: number of images by data set, for the hours of the config's epochs.
    """
    device, cores, epochs = "CPU" if model.shared else "GPU", model.step / model.loader, config.optim.epochs
    run: Row = {
        "images/s of each": round(model.images_per_second, 1),
        "images per update of each": model.images,
        "gradients' share of a step": f"{1 - model.efficiency:.1%}",
        "loader cores to keep up": f"{cores:.2g}" if cores else "-",
        "limit": model.limit,
    }
    hours: list[Row] = []
    for name, size in sizes.items():
        each = size * epochs / model.images_per_second / 3600
        row = {"data": name, "images": round(size * epochs), f"{device}-hours": each}
        hours.append(row | {f"hours on {model.ranks}": each / model.ranks})
    tables: dict[str, list[Row]] = {
        f"measured, steps of {batch} images": [{"what": k, "speed": spread(rate.wall)} for k, rate in rates.items()],
        f"a run on {model.ranks} of this {device}": [run],
        f"{epochs:g} epochs": hours,
    }
    remarks = [f"{model.limit} limits"]
    if not cores:
        remarks.append("data.train is not set: the loader was not measured, and is assumed to keep up")
    elif model.shared:
        remarks.append(f"without a GPU, step and loader share {model.cores} cores: their times add up")
    else:
        remarks.append(f"one GPU needs {cores:.2g} loader cores; {model.cores} are assumed")
    if model.ranks > 1:
        remarks.append(f"exchange of gradients: modelled, at {BANDWIDTH / 1e9:g} GB/s per {device}, assumed")
    return Report(tables, [*remarks, "images of the steps were noise; pictures, kNN and checkpoints come on top"])


def _add_card(report: Report, config: PretrainConfig, here: AnalyticModel) -> None:
    """Add the modelled time of a step and of the config's epochs on as many GPUs of a kind that is not available."""
    kinds = model_step(config, batch=_MODEL_BATCH)
    step, epochs = sum(kinds.values(), Kind()), config.optim.epochs
    report.tables[f"an eager step of {_MODEL_BATCH} images on an {CARD}: a model, not measured"] = [
        {
            "what": name,
            "ms": f"{1e3 * kind.seconds:.1f}",
            "TFLOP": f"{kind.flops / 1e12:.2f}",
            "GB": f"{kind.bytes / 1e9:.1f}",
            "kernels": kind.kernels,
        }
        for name, kind in [*sorted(kinds.items(), key=lambda row: -row[1].seconds), ("all", step)]
    ]
    alone = _MODEL_BATCH / step.seconds
    model = replace(here, compute=here.images / alone)
    hours = epochs * IMAGENET_IMAGES / model.step / 3600
    report.remarks.append(
        f"the model's {CARD}: {alone:,.0f} images/s, {step.flops / step.seconds / 1e12:.0f} TFLOP/s; {hours:,.1f} "
        f"GPU-hours for {epochs:g} epochs of ImageNet-1K, {hours / model.ranks:,.1f} hours on {model.ranks}, of which "
        f"{1 - model.efficiency:.1%} exchange gradients, with loaders that keep up"
    )
