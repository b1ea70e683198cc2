"""What every evaluation command shares: its context, and the lines and entries that describe models and data.

open_context -> join the process group -> EvalContext: device, precision, batch, loader workers
print_main, finish -> stdout and JSON, from rank 0 only
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from maedistill.config.schema import MAX_BAD_FRACTION, Precision
from maedistill.data.loading.workers import TIMEOUT_SECONDS
from maedistill.data.shards.index import ShardIndex
from maedistill.escaping import say
from maedistill.machine import autocast, cpu_name, loader_workers, resolve_precision
from maedistill.processes import distributed
from maedistill.runs.records import write_text
from maedistill.runs.run import Run
from maedistill.weights.network import Network

# Seconds that a rank waits for the others: shares of images are equal, but machines may differ in speed. Learning rates
# are not: a rank may have none, while another fits one for hours.
_PATIENCE, _PATIENCE_OF_FITS = 1800, 24 * 3600


@dataclass(frozen=True)
class EvalContext:
    """The settings of all passes of an evaluation. batch: images per forward pass and rank; workers: per rank.

    precision: fp32, or bf16 or fp16 under autocast, or auto. timeout_seconds: as in `load_batches`.
    max_bad_fraction: of the images, see `full_pass`.
    """

    device: torch.device
    batch: int
    workers: int
    precision: Precision = "fp32"
    timeout_seconds: float = TIMEOUT_SECONDS
    max_bad_fraction: float = MAX_BAD_FRACTION

    @classmethod
    def of_run(cls, run: Run) -> "EvalContext":
        """Return the context in which a run in progress evaluates its own networks."""
        return cls(
            device=run.device,
            batch=run.plan.batch.micro_batch,
            workers=run.workers,
            precision=run.config.engine.precision,
            timeout_seconds=run.config.engine.loader_seconds,
            max_bad_fraction=run.config.data.max_bad_fraction,
        )

    @property
    def device_name(self) -> str:
        """Return the GPU's name, or the number of CPU threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {torch.get_num_threads()} threads"

    def autocast(self) -> torch.autocast:
        """Return the autocast of the precision, which does nothing in fp32."""
        return autocast(self.device, resolve_precision(self.precision, self.device))


def open_context(
    *, batch: int, workers: int | None, threads: int | None, precision: Precision, fits: bool = False
) -> EvalContext:
    """Join the process group. workers, threads: per process, by default its share of the cores. Collective.

    fits: learning rates are divided among the processes, which may take long.
    """
    distributed.open_group(_PATIENCE_OF_FITS if fits else _PATIENCE)
    device, cores = distributed.device(), distributed.cores()
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or cores)
    return EvalContext(device, batch, loader_workers(workers, cores), resolve_precision(precision, device))


def print_main(label: str, text: str) -> None:
    """Print a labelled line on rank 0 only, and flush."""
    if distributed.is_main():
        say(f"{label:<11} {text}")


def print_network(label: str, network: Network) -> None:
    """Describe a network and its input: size, crop and normalisation."""
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (network.mean, network.std))
    crop = f"{network.crop_mode} crop {network.crop:g}, {network.interpolation}"
    print_main(label, network.describe())
    print_main("input", f"{network.size} px, {crop}, mean {mean}, std {std}")
    if (network.test_size, network.test_crop) not in ((None, None), (network.size, network.crop)):
        print_main("", f"its published accuracy is for {network.test_size} px, crop {network.test_crop:g}: --test-size")


def print_data(label: str, index: ShardIndex, shards: str) -> None:
    """Describe the data: numbers of images and classes, fingerprint and shards."""
    counts = f"{len(index):,} images, {index.num_classes:,} classes"
    print_main(label, f"{counts}, fingerprint {index.fingerprint()[:12]}, {shards}")


def computing(network: Network, context: EvalContext) -> EvalContext:
    """Return the context in which a network computes: a graph runs on the CPU."""
    return replace(context, device=torch.device("cpu")) if network.precision else context


def metadata(network: Network, context: EvalContext) -> dict[str, Any]:
    """Return the entries of a network, its input and the context for a result file."""
    names = ("license", "parameters", "size", "crop", "interpolation", "crop_mode", "mean", "std")
    entries = {"model": network.name, "classes": network.num_classes} | {n: getattr(network, n) for n in names}
    entries |= {"file_bytes": network.file_bytes} if network.file_bytes else {}
    precision = network.precision or context.precision
    there = computing(network, context)
    entries |= {"processor": cpu_name()} if there.device.type == "cpu" else {}
    return entries | {"device": there.device_name, "batch": context.batch, "precision": precision}


def finish(result: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """Write the result as JSON if there is a file, and return it. Collective.

    All ranks wait for the writer, because a launcher ends the others when one rank exits.
    """
    if file is not None:
        distributed.on_main(lambda: write_text(file, json.dumps(result, indent=1) + "\n"))
    distributed.barrier()
    return result
