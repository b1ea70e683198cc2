"""A network that is never trained: it resizes and normalises images for itself.

B batch   s image side   t image side of the network
"""

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as vision
from torchvision.transforms.v2.functional import InterpolationMode

from maedistill.data.images.transforms import normalize
from maedistill.weights.network import Network


class FrozenNetwork(nn.Module):
    """Holds `module`, the network that `source` has opened or a view of it, without gradients and in `dtype`.

    A subclass runs it, in `forward`. It stands beside the engine: it is never wrapped, trained or saved.
    """

    mean: Tensor
    std: Tensor

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
