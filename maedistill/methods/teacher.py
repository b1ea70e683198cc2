"""Teachers: the base class of all, and the one of pre-training.

`weights/open_network.py` opens their weights, called by `pretraining/build.py` and `finetuning/build_distillation.py`.

B batch   N, T patches, and those visible to the teacher   Q its prefix tokens   D_t its width   H its heads   d their
width   k patches of the teacher along a side of a student's   s image side   t image side of the teacher
"""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from maedistill.data.images.transforms import normalize
from maedistill.errors import ConfigError
from maedistill.losses.features import mean_of_blocks
from maedistill.models.blocks import has_mlp_branch
from maedistill.models.encoder import Encoder, MaskedEncoder
from maedistill.models.masking import PatchSplit
from maedistill.models.patches import finer_ids
from maedistill.models.vits import TimmModel
from maedistill.weights.network import Network


class TeacherNetwork(nn.Module):
    """A network that teaches: `module`, which `source` has opened, or a view of it. A subclass runs it, in `forward`.

    It stands beside the engine: no gradients, in `dtype`, and images resized and normalised for it.
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


class Teacher(TeacherNetwork):
    """Computes the features of the teacher's tapped blocks, or with `relations` their queries, keys and values.

    last: the target of a tap is made of the outputs of so many blocks that end there, see `mean_of_blocks`.
    output: of a block: its rows (`block`), or what its MLP adds to them (`mlp`).

    It sees its visible patches only, and runs up to its last tap. It resizes the images so that each patch of the
    student's covers the same part of the image as one of its own, or as k x k of them, whose rows are averaged.
    """

    network: Encoder

    def __init__(
        self,
        source: Network,
        *,
        taps: Sequence[int],
        last: int | None = None,
        output: str = "block",
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
        blocks: TimmModel = self.encoder.vit.blocks if isinstance(self.encoder, MaskedEncoder) else None
        if output == "mlp" and not (blocks and all(has_mlp_branch(blocks[tap]) for tap in needed)):
            raise ConfigError(
                f"align.output: in {source.name} no block adds its MLP's output to that of its attention",
                "use align.output=block, or a ViT of timm, e.g. vit_base_patch16_224 or vit_base_patch16_dinov3",
            )
        self.tapped = {"relations" if relations else {"block": "taps", "mlp": "branches"}[output]: tuple(needed)}
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
        own = self.own_split(split)
        _, outputs = self.network(self.prepare(images), own.teacher, **self.tapped, **self.ends_early)
        return self.targets(self.merge(outputs, own.num_teacher // split.num_teacher))

    def own_split(self, split: PatchSplit) -> PatchSplit:
        """Return `split` on the teacher's own grid, where k x k patches cover one of the student's."""
        grid = math.isqrt(split.order.shape[1])
        k = self.encoder.grid // grid
        if k == 1:
            return split
        order = finer_ids(split.order, grid=grid, factor=k)  # [B, N * k * k]
        return PatchSplit(order, split.num_student * k * k, split.num_teacher * k * k)

    def merge(self, outputs: dict[int, Tensor], parts: int) -> dict[int, Tensor]:
        """Average the `parts` patches of each of the student's: Q + T * parts rows of each output -> Q + T rows."""
        if parts == 1:
            return outputs
        merged: dict[int, Tensor] = {}
        for block, rows in outputs.items():
            prefix, patches = rows.tensor_split([self.num_prefix], dim=-2)
            merged[block] = torch.cat([prefix, patches.unflatten(-2, (-1, parts)).mean(-2)], dim=-2)
        return merged

    def targets(self, outputs: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return the target of each tap: the output of its block, or made of several."""
        if not self.means:
            return outputs
        return {tap: mean_of_blocks([outputs[block] for block in blocks]) for tap, blocks in self.means.items()}
