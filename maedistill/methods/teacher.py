"""The frozen teacher of pre-training: it runs up to its last tap on its visible patches.

`pretraining/build.py` opens its weights.

B batch   T patches visible to the teacher   Q its prefix tokens   D_t its width   H its heads   d their width
s image side
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from maedistill.errors import ConfigError
from maedistill.models.encoder import MaskedEncoder
from maedistill.models.masking import PatchSplit
from maedistill.weights.frozen import FrozenNetwork
from maedistill.weights.network import Network


class Teacher(FrozenNetwork):
    """Computes the features of the teacher's tapped blocks, or with `relations` their queries, keys and values.

    If its patch size differs from the student's, it resizes the images to the student's grid: patch i covers the same
    part of the image for both.
    """

    def __init__(
        self, source: Network, *, taps: Sequence[int], relations: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(source, source.encoder, dtype)
        if max(taps) >= self.encoder.depth:
            raise ConfigError(
                f"align.teacher: block {max(taps)} does not exist, the teacher has {self.encoder.depth}",
                f"use 0 to {self.encoder.depth - 1}",
            )
        self.tapped = {"relations" if relations else "taps": tuple(taps)}
        self.num_prefix, self.width = self.encoder.num_prefix, self.encoder.width

    @property
    def encoder(self) -> MaskedEncoder:
        """Return the network."""
        return self.network

    @torch.no_grad()
    def forward(self, images: Tensor, split: PatchSplit) -> dict[int, Tensor]:
        """Map images in [0, 1], [B, 3, s, s], to {block: [B, Q + T, D_t]}, rows in the order of `split.teacher`.

        With `relations` the values are [3, B, H, Q + T, d].
        """
        return self.network(self.prepare(images), split.teacher, **self.tapped, to_last_tap=True)[1]
