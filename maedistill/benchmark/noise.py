"""Images that are made up, and the optimizer that leaves the weights alone: what a step costs depends on neither.

B images   s image side
"""

import torch
from torch import Tensor, nn

from maedistill.build_pretraining import split_of
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.transforms import random_flip, to_unit
from maedistill.masking import PatchSplit
from maedistill.training.optim import build_optimizer, parameter_groups


class Noise:
    """A batch of noise at the config's image size, drawn once, that each step flips and splits anew.

    first: position of the first image in the epoch. num_patches: of an image.
    """

    def __init__(
        self, config: PretrainConfig, batch: int, *, num_patches: int, device: torch.device, first: int = 0
    ) -> None:
        side = config.data.image_size
        self.images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=device)  # from the loader
        self._config, self._num_patches = config, num_patches
        self._positions = torch.arange(first, first + batch, device=device)

    def draw(self) -> tuple[Tensor, PatchSplit]:
        """Images [B, 3, s, s] in [0, 1] and their split, as the training loop makes them of what the loader brings."""
        images = to_unit(self.images)
        if self._config.data.flip:
            images = random_flip(images, self._positions, seed=self._config.seed)
        return images, split_of(self._config, self._positions, self._num_patches)


def idle_optimizer(method: nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    """The config's optimizer at learning rate 0, where it costs the same and moves nothing."""
    return build_optimizer(parameter_groups(method, config.optim.weight_decay), lr=0.0, betas=config.optim.betas)
