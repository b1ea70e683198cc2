"""Prepare decoded images for the network: crop in the worker, flip and normalise on the device.

Workers return uint8 crops, so that only a quarter of the bytes of float32 cross the bus. The crop is torchvision's
RandomResizedCrop, with draws that depend on (seed, position) instead of a generator's state.

    B batch   H, W image size   s crop size
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from maedistill.randomness import Stream, uniform

_TRIES = 10  # attempts of torchvision's RandomResizedCrop before it falls back to a centre crop
CROP_DRAWS = 2 * _TRIES + 2
Box = tuple[int, int, int, int]  # top, left, height, width


def random_box(
    height: int, width: int, draws: Sequence[float], *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Return the box of RandomResizedCrop (Szegedy et al., 2015, as in torchvision) for `CROP_DRAWS` uniform draws.

    scale: range of the box's share of the area. ratio: range of its width / height, log-uniform.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(_TRIES):
        area = height * width * (scale[0] + draws[2 * i] * (scale[1] - scale[0]))
        aspect = math.exp(low + draws[2 * i + 1] * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[-2] * (height - h + 1)), int(draws[-1] * (width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def crop(image: Tensor, box: Box, *, size: int) -> Tensor:
    """Crop the box and resize it, bicubic with antialiasing: uint8 [3, H, W] -> uint8 [3, s, s], channels last.

    The pixels equal those of torchvision's `resized_crop`, which spends a third of its time on making them planar.
    """
    top, left, height, width = box
    cut = image.permute(1, 2, 0)[None, top : top + height, left : left + width].permute(0, 3, 1, 2)  # [1, 3, h, w]
    return interpolate(cut, size=(size, size), mode="bicubic", antialias=True)[0]


def to_float01(images: Tensor) -> Tensor:
    """Convert uint8 [B, 3, s, s] to float32 in [0, 1], on the same device."""
    return images.float().div_(255)


def random_flip(images: Tensor, positions: Tensor, *, seed: int) -> Tensor:
    """Flip images horizontally with probability 1/2, drawn from (seed, position): [B, 3, s, s] -> [B, 3, s, s]."""
    mirrored = uniform(seed, positions, Stream.FLIP, n=1) < 0.5  # [B, 1]
    return torch.where(mirrored[:, :, None, None], images.flip(-1), images)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (images - mean) / std per channel: images [B, 3, s, s] in [0, 1], mean and std [3, 1, 1]."""
    return (images - mean) / std
