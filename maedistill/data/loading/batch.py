"""One micro-batch of training images, as workers make it and the training loop gets it.

m micro-batch   s crop size
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch, and what had to be replaced in it."""

    images: Tensor  # uint8 [m, 3, s, s]; on the host channels last in memory, on the device planar
    positions: Tensor  # int64 [m]
    labels: Tensor  # int64 [m], of the samples that were really read; -1 where the index has none
    samples: Tensor  # int64 [m], stays on the host
    bad: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device, its images planar."""
        images, positions, labels = (
            part.to(device, non_blocking=True) for part in (self.images, self.positions, self.labels)
        )
        return Batch(images.contiguous(), positions, labels, self.samples, self.bad)

    def pin_memory(self) -> "Batch":
        """Called by the loader when it feeds a GPU."""
        images, positions, labels = (part.pin_memory() for part in (self.images, self.positions, self.labels))
        return Batch(images, positions, labels, self.samples, self.bad)
