"""The setting of an evaluation: process group, device, precision and loader workers; and its output, from rank 0 only.

open_setting -> join the process group -> EvalContext, whose `loop` holds the keywords of every pass
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maedistill.data.shards.index import ShardIndex
from maedistill.evaluation.full_pass import Predictor
from maedistill.machine import cpu_share
from maedistill.machine import precision as resolve_precision
from maedistill.processes import distributed
from maedistill.weights.network import Network

_PATIENCE = 1800  # seconds that a rank waits for the others: shares are equal, but machines may differ in speed


@dataclass(frozen=True)
class EvalContext:
    """The settings shared by all passes of an evaluation. batch, workers: per process."""

    device: torch.device
    precision: str
    batch: int
    workers: int

    @property
    def loop(self) -> dict[str, Any]:
        """Return the keywords of `full_pass`."""
        return {"device": self.device, "batch": self.batch, "workers": self.workers}

    @property
    def device_name(self) -> str:
        """Return the GPU's name, or the number of CPU threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {torch.get_num_threads()} threads"

    @property
    def facts(self) -> dict[str, Any]:
        """Return the entries for a result file."""
        return {"device": self.device_name, "batch": self.batch, "precision": self.precision}

    def view(self, network: Network, *, columns: Tensor | None = None) -> Predictor:
        """Move the network to the device and wrap it with its normalisation."""
        return Predictor(
            network.module.to(self.device),
            mean=network.mean,
            std=network.std,
            device=self.device,
            precision=self.precision,
            columns=columns,
        )


def open_setting(*, batch: int, workers: int | None, threads: int | None, precision: str) -> EvalContext:
    """Join the process group. workers, threads: per process, by default its share of the cores. Collective."""
    distributed.open_group(_PATIENCE)
    device, cores = distributed.device(), cpu_share(distributed.local_world_size())
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or cores)
    return EvalContext(
        device, resolve_precision(precision, device), batch, min(8, cores) if workers is None else workers
    )


def say(*lines: str) -> None:
    """Print on rank 0 only, and flush."""
    if distributed.is_main() and lines:
        print("\n".join(lines), flush=True)


def describe_input(network: Network) -> str:
    """Describe the input images of the network: size, crop and normalisation."""
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (network.mean, network.std))
    how = f"{network.crop_mode} crop {network.crop:g}, {network.interpolation}"
    return f"{network.size} px, {how}, mean {mean}, std {std}"


def describe_data(index: ShardIndex, shards: str) -> str:
    """Describe the data: numbers of images and classes, fingerprint and shards."""
    return f"{len(index):,} images, {index.num_classes:,} classes, fingerprint {index.fingerprint()[:12]}, {shards}"


def facts_of(network: Network) -> dict[str, Any]:
    """Return the entries of a network and its input for a result file."""
    return {
        "model": network.name,
        "license": network.license,
        "parameters": network.parameters,
        "classes": network.num_classes,
        "size": network.size,
        "crop": network.crop,
        "interpolation": network.interpolation,
        "crop_mode": network.crop_mode,
        "mean": network.mean,
        "std": network.std,
    }
