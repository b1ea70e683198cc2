"""The teachers of fine-tuning. Each adapts the student's images to its own input, and runs as deep as needed.

    student's images, normalised, mixed -> back to pixels -> the teacher's size -> its normalisation -> Outputs

B batch   s image side of the student   C classes of the student   g side of the student's grid
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from maedistill.finetuning.outputs import FeatureInfo, Outputs, RequestedOutputs, forward_outputs
from maedistill.methods.teacher import TeacherNetwork
from maedistill.weights.network import Network

_ON_GRID = ("features/", "attention/")


@dataclass(frozen=True)
class TeacherSource:
    """An opened teacher. classes: indices of its outputs for the student's classes, None if the classes are the same.

    fingerprint: of its weights.
    """

    network: Network
    features: FeatureInfo
    classes: tuple[int, ...] | None
    fingerprint: str

    def describe(self) -> str:
        """Return one line for the log: the network, its image size, the classes in use."""
        subset = f", {len(self.classes)} of its classes" if self.classes is not None else ""
        return f"{self.network.describe()}  sees {self.network.size} px{subset}"


class OutputTeacher(TeacherNetwork):
    """Computes what terms compare: outputs of a network that sees the student's images, including mixed ones."""

    student_mean: Tensor
    student_std: Tensor
    classes: Tensor | None

    def __init__(
        self,
        source: Network,
        *,
        requested: RequestedOutputs,
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
        super().__init__(source, source.module, dtype)
        self.requested, self.student_grid = requested, student_grid
        for name, values in (("student_mean", student_mean), ("student_std", student_std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.register_buffer("classes", None if classes is None else torch.tensor(classes), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        """Return the requested outputs on the student's grid and classes, of the student's images [B, 3, s, s]."""
        pixels = images * self.student_std + self.student_mean  # in [0, 1], except for noise in erased rectangles
        outputs = forward_outputs(self.network, self.prepare(pixels), self.requested)
        if self.classes is not None and "logits" in outputs:
            outputs["logits"] = outputs["logits"][:, self.classes]  # [B, C]
        return {name: self._on_grid(maps) if name.startswith(_ON_GRID) else maps for name, maps in outputs.items()}

    def _on_grid(self, maps: Tensor) -> Tensor:
        """Resample maps [B, D, h, w] to the student's grid: [B, D, g, g]."""
        size = (self.student_grid, self.student_grid)
        if maps.shape[-2:] == size:
            return maps
        return F.interpolate(maps.float(), size=size, mode="bilinear", antialias=True)
