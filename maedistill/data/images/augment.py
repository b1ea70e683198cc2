"""Augment training images: RandAugment on crops in the loader workers; erasing and mixing on batches on the device.

    crop uint8 [3, s, s], position -> RandAugment -> crop uint8 [3, s, s]
    images [B, 3, s, s], labels [B] -> Mixing: erase, mix with the flipped batch -> images [B, 3, s, s], targets [B, C]

timm implements all of it and draws from the global generators of Python, NumPy and torch. RandAugment reseeds them for
every crop from (seed, position). Calling `seed_generators` before each batch does the same for Mixing. So the result
does not depend on the worker, rank or layout.

timm flips before RandAugment; here the flip comes afterwards, on the device. The distribution is the same: mirroring
turns a rotation, horizontal shear or translation by v into one by -v, timm draws both signs of v with equal probability
(with `inc` and without), and colour operations do not depend on the flip. One exception: timm's ShearY keeps the left
column in place, so here it keeps the right column in half of the images.

    B micro-batch   C classes   s image side
"""

import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from maedistill.randomness import Stream, key


class RandAugment:
    """timm's RandAugment (Cubuk et al., 2019) as `timm.data.create_transform` configures it, seeded by the position.

    spec: in timm's notation, e.g. rand-m9-mstd0.5-inc1. size: side of the crops in pixels. mean: of the normalisation,
    for pixels in [0, 1]; it fills the pixels that a rotation or shift leaves empty.
    """

    def __init__(self, spec: str, *, size: int, mean: tuple[float, float, float], seed: int) -> None:
        self.seed = seed
        options = {
            "translate_const": int(size * 0.45),
            "img_mean": tuple(min(255, round(255 * value)) for value in mean),
            "interpolation": str_to_pil_interp("bicubic"),
        }
        self.transform = rand_augment_transform(spec, options)
        for operation in self.transform.ops:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize

    def __call__(self, crop: Tensor, position: int) -> Tensor:
        """Augment a crop: uint8 [3, s, s] -> uint8 [3, s, s]. It reseeds the global generators of Python and NumPy."""
        _seed_host(self.seed, Stream.AUGMENT, position)
        return vision.pil_to_tensor(self.transform(vision.to_pil_image(crop)))


class Mixing:
    """Random erasing (Zhong et al., 2017), mixup (Zhang et al., 2018), cutmix (Yun et al., 2019), label smoothing.

    mixup, cutmix: alphas of the Beta distributions, 0 for none; one lambda for the whole batch, which is mixed in
    either way, half of the time each if both are on. erasing: probability that a rectangle of an image is filled with
    noise. smoothing: share of a target that is spread over all classes.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float,
        cutmix: float,
        erasing: float,
        smoothing: float,
        device: torch.device,
    ) -> None:
        self.num_classes, self.smoothing = num_classes, smoothing
        self.erase = RandomErasing(erasing, mode="pixel", device=device)
        self.mix = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )
        self.mixes = max(mixup, cutmix) > 0

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Augment normalised images [B, 3, s, s], in place, with labels int64 [B] -> images, targets float [B, C].

        The host never waits for the device. A batch to mix must be even, which the config's `group` ensures.
        """
        images = self.erase(images)
        if self.mixes:
            return self.mix(images, labels)
        return images, mixup_target(labels, self.num_classes, smoothing=self.smoothing)


def seed_generators(*parts: int) -> None:
    """Seed the global generators of Python, NumPy and torch, on every device, from `parts`.

    Code without a generator argument needs this: timm's Mixup and RandomErasing, and drop path.
    """
    _seed_host(*parts)
    torch.manual_seed(key(*parts))


def _seed_host(*parts: int) -> None:
    """Seed Python and NumPy differently: their algorithms are the same, so one seed would give the same numbers."""
    random.seed(key(*parts, 1) % 2**64)  # Python ignores the sign of a seed
    np.random.seed(np.array([key(*parts, 2)]).view(np.uint32))


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """Return black for 0 bits, timm's posterize at magnitude 10: Pillow did so before version 13 and now raises."""
    return posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
