"""Synthetic images, and an optimizer that leaves the weights unchanged: the cost of a step depends on neither.

B images   s image side
"""

from functools import partial

import torch
from torch import Tensor, nn

from maedistill.config.pretrain import PretrainConfig
from maedistill.models.masking import PatchSplit
from maedistill.pretraining.build import step_inputs
from maedistill.training.compilation import compile_function
from maedistill.training.optim import build_optimizer, parameter_groups


class SyntheticBatch:
    """A batch of noise at the config's image size, drawn once; each step flips and splits it again.

    first: position of the first image in the epoch. num_patches: patches of an image. compiled: prepare images and
    masks in one compiled graph.
    """

    def __init__(
        self,
        config: PretrainConfig,
        batch: int,
        *,
        num_patches: int,
        device: torch.device,
        first: int = 0,
        compiled: bool = False,
    ) -> None:
        side = config.data.image_size
        self.images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=device)  # from the loader
        inputs = partial(step_inputs, config, num_patches=num_patches)
        self._inputs = compile_function(inputs) if compiled else inputs
        self._positions = torch.arange(first, first + batch, device=device)

    def draw(self) -> tuple[Tensor, PatchSplit]:
        """Return images [B, 3, s, s] in [0, 1] and their split, prepared as in the training loop."""
        return self._inputs(self.images, self._positions)


def zero_lr_optimizer(method: nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    """Build the config's optimizer with learning rate 0: it costs the same and leaves the weights unchanged."""
    return build_optimizer(parameter_groups(method, config.optim.weight_decay), lr=0.0, betas=config.optim.betas)
