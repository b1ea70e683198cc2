"""Frozen teachers: the base class of all, and the one of pre-training.

`weights/network.py` opens their weights, called by `pretraining/build.py` and `finetuning/build_teachers.py`.

B batch   T patches visible to the teacher   Q its prefix tokens   D_t its width   H its heads   d their width
s image side   t image side of the teacher
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from maedistill.data.images.transforms import normalize
from maedistill.errors import ConfigError
from maedistill.losses.features import mean_of_blocks
from maedistill.models.encoder import Encoder, MaskedEncoder, TimmModel
from maedistill.models.masking import PatchSplit
from maedistill.weights.network import Network


class FrozenNetwork(nn.Module):
    """Holds `module`, the network that `source` has opened or a view of it, without gradients and in `dtype`.

    It resizes and normalises images for itself; a subclass runs it, in `forward`. It stands beside the engine: it is
    never wrapped, trained or saved.
    """

    mean: Tensor
    std: Tensor
    network: TimmModel

    def __init__(self, source: Network, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.image_size, self.dtype = module.to(dtype), source.size, dtype
        self.register_buffer("mean", torch.tensor(source.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(source.std).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def prepare(self, images: Tensor) -> Tensor:
        """Resize images in [0, 1] to the network's own size, and normalise them: [B, 3, s, s] -> [B, 3, t, t]."""
        if images.shape[-1] != self.image_size:
            size = [self.image_size, self.image_size]
            images = vision.resize(images, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return normalize(images, self.mean, self.std).to(self.dtype)


class Teacher(FrozenNetwork):
    """Computes the features of the teacher's tapped blocks, or with `relations` their queries, keys and values.

    last: the target of a tap is made of the outputs of so many blocks that end there, see `mean_of_blocks`.

    It sees its visible patches only, and runs up to its last tap. If its patch size differs from the student's, it
    resizes the images to the student's grid: patch i covers the same part of the image for both.
    """

    network: Encoder

    def __init__(
        self,
        source: Network,
        *,
        taps: Sequence[int],
        last: int | None = None,
        relations: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(source, source.encoder, dtype)
        if max(taps) >= self.encoder.depth:
            raise ConfigError(
                f"align.teacher: block {max(taps)} does not exist, the teacher has {self.encoder.depth}",
                f"use 0 to {self.encoder.depth - 1}",
            )
        self.means = {tap: range(tap - last + 1, tap + 1) for tap in taps} if last is not None else {}
        needed = sorted({*chain(*self.means.values())}) or taps
        self.tapped = {"relations" if relations else "taps": tuple(needed)}
        self.ends_early = {"to_last_tap": True} if isinstance(self.encoder, MaskedEncoder) else {}
        self.num_prefix, self.width = self.encoder.num_prefix, self.encoder.width

    @property
    def encoder(self) -> Encoder:
        """Return the network."""
        return self.network

    @torch.no_grad()
    def forward(self, images: Tensor, split: PatchSplit) -> dict[int, Tensor]:
        """Map images in [0, 1], [B, 3, s, s], to {block: [B, Q + T, D_t]}, rows in the order of `split.teacher`.

        With `relations` the values are [3, B, H, Q + T, d].
        """
        _, outputs = self.network(self.prepare(images), split.teacher, **self.tapped, **self.ends_early)
        return self.targets(outputs)

    def targets(self, outputs: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return the target of each tap: the output of its block, or made of several."""
        if not self.means:
            return outputs
        return {tap: mean_of_blocks([outputs[block] for block in blocks]) for tap, blocks in self.means.items()}
