"""Masked autoencoding (He et al., CVPR 2022): predict the pixels of hidden patches from the visible ones.

`MAE` is also the base class of the distillation methods, which add terms to its loss. A method is the module that the
engine trains: it takes images and a patch split, and returns named losses.

    B batch   N patches   S visible   H predicted   P prefix tokens   D width   p patch side   s image side
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from maedistill.data.images.transforms import normalize
from maedistill.models.decoder import TokenDecoder
from maedistill.models.encoder import Encoder
from maedistill.models.masking import PatchSplit, num_visible
from maedistill.models.patches import gather_rows, patchify, unpatchify

BlockFeatures = dict[int, Tensor]  # features by block, see `MaskedEncoder.forward`
Losses = dict[str, Tensor]


@dataclass(frozen=True)
class PixelSpec:
    """The pixel loss. mean, std: of the student's normalisation. target: a kind of `patch_statistics`.

    predict_ratio: the share of the hidden patches that is predicted.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    target: str = "norm_patch"
    weight: float = 1.0
    predict_ratio: float = 1.0


class MAE(nn.Module):
    """Encoder, decoder and the pixel loss.

    decoder: None for a distillation method without a pixel loss. ramp: a factor in [0, 1] on the terms of teachers,
    which the loop sets before each step.
    """

    mean: Tensor
    std: Tensor
    ramp: Tensor

    def __init__(self, encoder: Encoder, decoder: TokenDecoder | None, *, pixels: PixelSpec) -> None:
        super().__init__()
        self.encoder, self.decoder, self.pixels = encoder, decoder, pixels
        self.register_buffer("mean", torch.tensor(pixels.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(pixels.std).view(3, 1, 1), persistent=False)
        self.register_buffer("ramp", torch.ones(()), persistent=False)

    def forward(self, images: Tensor, split: PatchSplit, target: BlockFeatures | None = None) -> Losses:
        """Return the losses of one micro-batch: scalars `pixels` and `loss`. images: in [0, 1], [B, 3, s, s]."""
        pixels, _ = self.reconstruct(images, split)
        assert pixels is not None
        return {"loss": self.pixels.weight * pixels, "pixels": pixels}

    def add_pixels(self, pixels: Tensor | None, loss: Tensor, terms: Losses) -> Losses:
        """Return the losses of a method: `loss`, with the weighted pixel loss added, and each term by name.

        pixels: of `reconstruct`. loss: the weighted sum of `terms`.
        """
        if pixels is None:
            return {"loss": loss, **terms}
        return {"loss": self.pixels.weight * pixels + loss, "pixels": pixels, **terms}

    def reconstruct(
        self, images: Tensor, split: PatchSplit, taps: Sequence[int] = (), *, relations: Sequence[int] = ()
    ) -> tuple[Tensor | None, BlockFeatures]:
        """Return the pixel loss and the features of the student's tapped blocks, see `MaskedEncoder.forward`.

        The loss is None without a decoder.
        """
        normalized = normalize(images, self.mean, self.std)
        more = {"relations": relations} if relations else {}  # only a plain ViT of timm has them
        tokens, features = self.encoder(normalized, split.student, taps=taps, **more)  # [B, P + S, D]
        if self.decoder is None:
            return None, features
        hidden = split.hidden[:, : self.num_predicted(split)]  # [B, H]: the order is random, so this is a random subset
        predicted = self.decoder(tokens, split, hidden)  # [B, H, p*p*3]
        return self.pixel_loss(predicted, images, normalized, hidden), features

    def pixel_loss(self, predicted: Tensor, images: Tensor, normalized: Tensor, hidden: Tensor) -> Tensor:
        """Return the pixel loss of the predictions [B, H, p*p*3] of the patches `hidden` [B, H]."""
        target = pixel_target(self.pixels_of(images, normalized, hidden), kind=self.pixels.target)
        return F.mse_loss(predicted.float(), target.float())

    def num_predicted(self, split: PatchSplit) -> int:
        """Return how many hidden patches of an image are predicted in training: H."""
        return num_visible(self.pixels.predict_ratio, split.hidden.shape[1])

    @torch.no_grad()
    def draw(self, images: Tensor, split: PatchSplit) -> Tensor:
        """Predict the pixels of all hidden patches, in [0, 1], and leave the visible ones black: [B, 3, s, s].

        Normalised targets are converted back with the statistics of the true patch, as in MAE's own pictures. Patches
        are predicted in groups of at most the training size, so that the decoder sees inputs as in training.
        """
        assert self.decoder is not None
        normalized = normalize(images, self.mean, self.std)
        tokens, _ = self.encoder(normalized, split.student)
        shift, scale = patch_statistics(self.pixels_of(images, normalized, split.hidden), kind=self.pixels.target)
        parts = split.hidden.split(self.num_predicted(split), dim=1)
        rows = torch.cat([self.decoder(tokens, split, part) for part in parts], dim=1)  # [B, N - S, p*p*3]
        rows = rows.float() * scale + shift
        if self.pixels.target != "norm_patch_channel":  # back from the student's normalisation to [0, 1]
            repeat = rows.shape[-1] // 3
            rows = rows * self.std.flatten().repeat(repeat) + self.mean.flatten().repeat(repeat)
        canvas = rows.new_zeros(len(rows), split.order.shape[1], rows.shape[-1])
        canvas.scatter_(1, split.hidden[..., None].expand_as(rows), rows)
        return unpatchify(canvas, self.encoder.patch_size).clamp(0, 1)

    def pixels_of(self, images: Tensor, normalized: Tensor, ids: Tensor) -> Tensor:
        """Return pixel rows of the patches `ids` [B, M]: of the plain images in AMD, else of the normalised input."""
        source = images if self.pixels.target == "norm_patch_channel" else normalized
        return gather_rows(patchify(source, self.encoder.patch_size), ids)  # [B, M, p*p*3]


def patch_statistics(rows: Tensor, *, kind: str) -> tuple[Tensor, Tensor]:
    """Return the shift and scale that normalise pixel rows [B, H, p*p*3]; both broadcast against the rows.

    raw: none (0 and 1). norm_patch: mean and sqrt(unbiased variance + 1e-6) over the whole patch (MAE, section 3).
    norm_patch_channel: mean and unbiased deviation + 1e-6 of each channel of the patch (VideoMAE and AMD).
    """
    if kind == "raw":
        return rows.new_zeros(1), rows.new_ones(1)
    if kind == "norm_patch":
        return rows.mean(-1, keepdim=True), (rows.var(-1, keepdim=True) + 1e-6).sqrt()
    assert kind == "norm_patch_channel"
    pixels = rearrange(rows, "b h (x c) -> b h x c", c=3)
    shift, scale = pixels.mean(2), pixels.var(2).sqrt() + 1e-6  # [B, H, 3]
    return shift.repeat(1, 1, pixels.shape[2]), scale.repeat(1, 1, pixels.shape[2])


def pixel_target(rows: Tensor, *, kind: str) -> Tensor:
    """Return the decoder's target: pixel rows [B, H, p*p*3] of hidden patches, normalised by `kind`."""
    shift, scale = patch_statistics(rows, kind=kind)
    return (rows - shift) / scale


def mean_loss(losses: Losses) -> Tensor:
    """Return the mean of named scalar losses."""
    return torch.stack(list(losses.values())).mean()
