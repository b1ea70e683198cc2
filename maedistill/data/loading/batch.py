"""One micro-batch of training images, as the workers produce it and the training loop receives it.

m micro-batch   s crop size
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch, and a message for each sample that could not be decoded (`bad`)."""

    images: Tensor  # uint8 [m, 3, s, s]; on the host channels last in memory, on the device planar
    positions: Tensor  # int64 [m]
    labels: Tensor  # int64 [m], of the samples actually read; -1 for unlabelled samples
    samples: Tensor  # int64 [m], stays on the host
    bad: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device, without waiting; the images become planar."""
        images, positions, labels = (
            part.to(device, non_blocking=True) for part in (self.images, self.positions, self.labels)
        )
        return Batch(images.contiguous(), positions, labels, self.samples, self.bad)

    def pin_memory(self) -> "Batch":
        """Copy the batch to pinned memory; DataLoader calls this before copies to a GPU."""
        images, positions, labels = (part.pin_memory() for part in (self.images, self.positions, self.labels))
        return Batch(images, positions, labels, self.samples, self.bad)
