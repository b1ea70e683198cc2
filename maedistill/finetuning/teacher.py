"""A frozen teacher of fine-tuning: it adapts the student's images to its own input and runs only as deep as needed.

    student's images, normalised, mixed -> back to pixels -> the teacher's size -> its normalisation -> Outputs

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
    """Outputs of a network whose weights never change. It sees the student's images, including mixed ones."""

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
        """Freeze the network. student_mean, student_std: normalisation of incoming images. student_grid: g, the size
        to which feature and attention maps are resampled. classes: indices of its logits for the student's classes, in
        the student's order; None: all.
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
        """Return the wanted outputs on the student's grid and classes, of the student's images [B, 3, s, s]."""
        seen = view(self.network, self.prepare(images), self.wanted)
        if self.classes is not None and "logits" in seen:
            seen["logits"] = seen["logits"][:, self.classes]  # [B, C]
        return {name: self._on_grid(found) if name.startswith(_ON_GRID) else found for name, found in seen.items()}

    def prepare(self, images: Tensor) -> Tensor:
        """Resize and normalise the student's images for the network: [B, 3, s, s] -> [B, 3, t, t]."""
        pixels = images * self.student_std + self.student_mean  # in [0, 1], except for noise in erased rectangles
        if pixels.shape[-1] != self.image_size:
            size = [self.image_size, self.image_size]
            pixels = vision.resize(pixels, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return normalize(pixels, self.mean, self.std).to(self.dtype)

    def _on_grid(self, maps: Tensor) -> Tensor:
        """Resample maps [B, D, h, w] to the student's grid: [B, D, g, g]."""
        size = (self.student_grid, self.student_grid)
        if maps.shape[-2:] == size:
            return maps
        return F.interpolate(maps.float(), size=size, mode="bilinear", antialias=True)
