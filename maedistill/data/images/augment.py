"""Apply RandAugment (Cubuk et al., 2019) to training crops in loader workers, and seed the global generators.

    uint8 crop [3, s, s], position -> RandAugment -> uint8 crop [3, s, s]

timm draws from the global generators of Python and NumPy. They are reseeded for every crop from (seed, position), so
that the result does not depend on the worker, rank or batch.

timm flips before RandAugment; here the flip comes afterwards, on the device. The distribution is the same: mirroring
turns a rotation, horizontal shear or translation by v into one by -v, timm draws both signs of v with equal probability
(with `inc` and without), and colour operations do not depend on the flip. One exception: timm's ShearY keeps the left
column in place, so here it keeps the right column in half of the images.

    s crop size
"""

import random
import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from maedistill.errors import ConfigError
from maedistill.randomness import Stream, key

# timm silently ignores a section that it does not know, e.g. `inc` without its number. Its sets t3a and t3aw are
# excluded: they are 3-Augment, which is incomplete without colour jitter.
_SPEC = re.compile(r"rand(-((m|n|mmax|inc)\d+|(p|mstd)\d+(\.\d+)?|tweights))*")


class RandAugment:
    """timm's RandAugment as `timm.data.create_transform` configures it, seeded by the position of the crop.

    spec: in timm's notation, e.g. rand-m9-mstd0.5-inc1. size: side of the crops in pixels. mean: of the normalisation,
    for pixels in [0, 1]; it fills the pixels that a rotation or shift leaves empty. Raises `ConfigError` for a spec
    that timm would reject or misread.
    """

    def __init__(self, spec: str, *, size: int, mean: tuple[float, float, float], seed: int) -> None:
        if not _SPEC.fullmatch(spec):
            raise _wrong(spec)
        self.seed = seed
        self.transform = rand_augment_transform(
            spec,
            {
                "translate_const": int(size * 0.45),
                "img_mean": tuple(min(255, round(255 * value)) for value in mean),
                "interpolation": str_to_pil_interp("bicubic"),
            },
        )
        for operation in self.transform.ops:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
        weights = self.transform.choice_weights
        if weights is not None and self.transform.num_layers > len(weights):  # drawn without replacement
            raise _wrong(spec)

    def __call__(self, crop: Tensor, position: int) -> Tensor:
        """Augment a crop: uint8 [3, s, s] -> uint8 [3, s, s]. It reseeds the global generators of Python and NumPy."""
        _seed_host(self.seed, Stream.AUGMENT, position)
        return vision.pil_to_tensor(self.transform(vision.to_pil_image(crop)))


def seed_generators(*parts: int) -> None:
    """Seed the global generators of Python, NumPy and torch, on every device, from `parts`.

    Code without a generator argument needs this: timm's Mixup and RandomErasing, and drop path.
    """
    _seed_host(*parts)
    torch.manual_seed(key(*parts))


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """Return black for 0 bits, timm's posterize at magnitude 10: Pillow did so before version 13 and now raises."""
    return posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _seed_host(*parts: int) -> None:
    """Seed Python and NumPy differently: their algorithms are the same, so one seed would give the same numbers."""
    random.seed(key(*parts, 1) % 2**64)  # Python ignores the sign of a seed
    np.random.seed(np.array([key(*parts, 2)]).view(np.uint32))


def _wrong(spec: str) -> ConfigError:
    return ConfigError(
        f"augment.rand_augment={spec!r} is not in timm's notation for RandAugment",
        "write e.g. rand-m9-mstd0.5-inc1: magnitude 9 of 10, its deviation 0.5, stronger with the magnitude; "
        "also n (operations, 2; at most 15 with tweights), p (probability of each, 0.5), mmax, tweights",
    )
