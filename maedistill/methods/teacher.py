"""The frozen teacher of pre-training: it runs up to its last tap on its visible patches, and is never trained or saved.

B batch   T patches visible to the teacher   Q its prefix tokens   D_t its width   H its heads   d their width
s image side
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as vision
from torchvision.transforms.v2.functional import InterpolationMode

from maedistill.data.images.transforms import normalize
from maedistill.errors import ConfigError
from maedistill.models.masking import PatchSplit
from maedistill.weights.source import Source


class Teacher(nn.Module):
    """Computes the features of the teacher's tapped blocks, or with `relations` their queries, keys and values.

    It takes images in [0, 1], and resizes and normalises them itself.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, source: Source, *, taps: Sequence[int], relations: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        depth = source.encoder.depth
        if max(taps) >= depth:
            raise ConfigError(
                f"align.teacher: block {max(taps)} does not exist, the teacher has {depth}", f"use 0 to {depth - 1}"
            )
        self.encoder = source.encoder.to(dtype)
        self.tapped, self.dtype = {"relations" if relations else "taps": tuple(taps)}, dtype
        self.num_prefix, self.width = source.encoder.num_prefix, source.encoder.width
        self.image_size = source.encoder.grid * source.encoder.patch_size
        self.register_buffer("mean", torch.tensor(source.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(source.std).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor, split: PatchSplit) -> dict[int, Tensor]:
        """Map images in [0, 1], [B, 3, s, s], to {block: [B, Q + T, D_t]}, rows in the order of `split.teacher`.

        With `relations` the values are [3, B, H, Q + T, d].
        """
        return self.encoder(self.prepare(images), split.teacher, **self.tapped, to_last_tap=True)[1]

    def prepare(self, images: Tensor) -> Tensor:
        """Normalise images in [0, 1], [B, 3, s, s], and resize them to the teacher's own size.

        If the two patch sizes differ, resizing gives teacher and student the same grid: patch i covers the same part of
        the image for both.
        """
        if images.shape[-1] != self.image_size:
            size = [self.image_size, self.image_size]
            images = vision.resize(images, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return normalize(images, self.mean, self.std).to(self.dtype)
