"""Augment normalised fine-tuning batches on the device: random erasing, mixup or cutmix, soft targets.

    images [B, 3, s, s], labels [B] -> erase -> mix with the flipped batch -> images [B, 3, s, s], targets [B, C]

timm implements all of it and draws from the global generators of Python, NumPy and torch. Calling
`augment.seed_generators` before each batch makes the result a pure function of the batch and the seed.

    B micro-batch   C classes   s image side
"""

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from maedistill.errors import ConfigError


class Mixing:
    """Random erasing (Zhong et al., 2017), mixup (Zhang et al., 2018), cutmix (Yun et al., 2019), label smoothing.

    mixup, cutmix: alphas of the Beta distributions, 0 for none; one lambda for the whole batch. mix_probability:
    probability that a batch is mixed. switch_probability: probability of cutmix if both are on. erasing: probability
    that a rectangle of an image is filled with noise. smoothing: share of a target that is spread over all classes.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float,
        cutmix: float,
        mix_probability: float,
        switch_probability: float,
        erasing: float,
        smoothing: float,
        device: torch.device,
    ) -> None:
        self.num_classes, self.smoothing = num_classes, smoothing
        self.erase = RandomErasing(erasing, mode="pixel", device=device)
        self.mix = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=mix_probability,
            switch_prob=switch_probability,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )
        self.mixes = mix_probability > 0 and max(mixup, cutmix) > 0

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Augment normalised images [B, 3, s, s], in place, with labels int64 [B] -> images, targets float [B, C].

        The host never waits for the device. Raise `ConfigError` for an odd batch, which cannot be mixed in pairs.
        """
        if self.mixes and len(images) % 2:
            raise ConfigError(
                f"a micro-batch of {len(images)} images cannot be mixed in pairs",
                "make engine.micro_batch even, and optim.global_batch a multiple of 2 * ranks; or set augment.mixup=0 "
                "augment.cutmix=0",
            )
        images = self.erase(images)
        if self.mixes:
            return self.mix(images, labels)
        return images, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
