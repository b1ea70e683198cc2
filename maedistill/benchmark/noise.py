"""Images that are made up, and the optimizer that leaves the weights alone: what a step costs depends on neither.

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
    """A batch of noise at the config's image size, drawn once, that each step flips and splits anew.

    first: position of the first image in the epoch. num_patches: of an image. compiled: prepare them in one graph.
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
        """Images [B, 3, s, s] in [0, 1] and their split, as the training loop makes them of what the loader brings."""
        return self._inputs(self.images, self._positions)


def zero_lr_optimizer(method: nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    """The config's optimizer at learning rate 0, where it costs the same and moves nothing."""
    return build_optimizer(parameter_groups(method, config.optim.weight_decay), lr=0.0, betas=config.optim.betas)
