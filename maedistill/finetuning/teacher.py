"""A frozen teacher of fine-tuning: fed what it expects from the student's images, run no deeper than the terms need.

    student's images, normalised, mixed -> back to pixels -> the teacher's size -> its normalisation -> View

B batch   s, t image sides of student and teacher   C classes of the student   g side of the student's grid
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as vision
from torchvision.transforms.v2.functional import InterpolationMode

from maedistill.data.images.transforms import normalize
from maedistill.finetuning.outputs import Outputs, RequestedOutputs, view
from maedistill.weights.network import Network

_ON_GRID = ("features/", "attention/")


class OfflineTeacher(nn.Module):
    """Views of a network whose weights never change. It sees what the student sees, mixed images included."""

    mean: Tensor
    std: Tensor
    student_mean: Tensor
    student_std: Tensor
    classes: Tensor | None

    def __init__(
        self,
        classifier: Network,
        *,
        wanted: RequestedOutputs,
        student_mean: Sequence[float],
        student_std: Sequence[float],
        student_grid: int,
        classes: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """student_mean, student_std: the normalisation of the images that come in. student_grid: g, to which feature
        and attention maps are resampled. classes: which of its logits are the student's, in their order; None: all.
        """
        super().__init__()
        self.network, self.wanted, self.dtype = classifier.module.to(dtype), wanted, dtype
        self.image_size, self.student_grid = classifier.size, student_grid
        statistics = {"mean": classifier.mean, "std": classifier.std}
        statistics |= {"student_mean": student_mean, "student_std": student_std}
        for name, values in statistics.items():
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.register_buffer("classes", None if classes is None else torch.tensor(classes), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        """images as the student reads them, [B, 3, s, s] -> what is wanted, on the student's grid and classes."""
        seen = view(self.network, self.prepare(images), self.wanted)
        if self.classes is not None and "logits" in seen:
            seen["logits"] = seen["logits"][:, self.classes]  # [B, C]
        return {name: self._on_grid(found) if name.startswith(_ON_GRID) else found for name, found in seen.items()}

    def prepare(self, images: Tensor) -> Tensor:
        """What the network reads: the student's images [B, 3, s, s] -> [B, 3, t, t], resized, normalised its way."""
        pixels = images * self.student_std + self.student_mean  # in [0, 1], but for noise in erased rectangles
        if pixels.shape[-1] != self.image_size:
            size = [self.image_size, self.image_size]
            pixels = vision.resize(pixels, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return normalize(pixels, self.mean, self.std).to(self.dtype)

    def _on_grid(self, maps: Tensor) -> Tensor:
        """Maps [B, D, h, w] resampled to the student's grid: [B, D, g, g]."""
        size = (self.student_grid, self.student_grid)
        if maps.shape[-2:] == size:
            return maps
        return F.interpolate(maps.float(), size=size, mode="bilinear", antialias=True)
