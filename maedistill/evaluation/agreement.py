"""Agreement of two classifiers, a student and its teacher, on the same images, each with its own preprocessing.

    EvaluationImages of TwoViews -> full_pass -> two logits -> Evaluation of the student, Agreement

Image size, crop and normalisation of the two may differ. Each image is decoded once.

    n images   b batch   s, t image sides of student and teacher   C classes
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from maedistill.data.loading.evaluation import EvaluationImages
from maedistill.errors import ConfigError, NumericsError
from maedistill.evaluation.accuracy import Evaluation, evaluation_of, judge, require_known_classes
from maedistill.evaluation.full_pass import Predictor, evaluation_mode, full_pass


@dataclass(frozen=True)
class Agreement:
    """How often the best classes are equal, and how much the probabilities differ."""

    images: int
    same: int
    teacher_top1: int  # images that the teacher classifies correctly
    kl: float  # KL(teacher, student) at temperature 1 in nats, mean over images: the exact sum, rounded once

    def line(self) -> str:
        """Format the result as one line."""
        same, right = (
            f"{100 * count / self.images:.2f} % ({count} of {self.images})" for count in (self.same, self.teacher_top1)
        )
        return f"same best class {same}, KL {self.kl:.4f}; the other's top-1 {right}"

    def facts(self) -> dict[str, float]:
        """Return the entries for a result file."""
        return {"against_same": self.same, "against_kl": self.kl, "against_top1": self.teacher_top1}


@dataclass(frozen=True)
class TwoViews:
    """A transform that prepares one image for two networks, in one flat row: RGB -> uint8 [3 s s + 3 t t]."""

    student: Callable[[Image.Image], Tensor]
    teacher: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        """Return both views, concatenated."""
        return torch.cat([self.student(image).flatten(), self.teacher(image).flatten()])


def evaluate_against(
    student: Predictor, teacher: Predictor, images: EvaluationImages, *, sizes: tuple[int, int], **keywords: Any
) -> tuple[Evaluation, Agreement]:
    """Evaluate both networks once on each image; `TwoViews` is the transform of `images`. Collective.

    sizes: (s, t). keywords: as in `full_pass`. The train/eval modes of the networks are restored. Raises the errors of
    `evaluate`, and ConfigError if the numbers of classes differ.
    """
    images.index.require_labels()

    @functools.cache
    def check(num_classes: int, of_teacher: int) -> None:
        require_same_classes(num_classes, of_teacher)
        require_known_classes(images, num_classes)

    def look(pixels: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        views = pixels.split([3 * size**2 for size in sizes], dim=1)  # uint8 [b, 3 s s] and [b, 3 t t]
        shaped = (view.unflatten(1, (3, size, size)) for view, size in zip(views, sizes, strict=True))
        mine, theirs = (viewer(view) for viewer, view in zip((student, teacher), shaped, strict=True))  # [b, C] both
        check(mine.shape[1], theirs.shape[1])
        return (*judge(mine, labels), judge(theirs, labels)[0][:, 1], divergence(mine, theirs))

    with evaluation_mode(student.network, teacher.network):
        ids, classes, numbers, said, kl = full_pass(images, look, **keywords)
    evaluation = evaluation_of(ids, classes, numbers, index=images.index)
    if not kl.isfinite().all():
        raise NumericsError(
            f"the other network's answers to {int((~kl.isfinite()).sum())} of {len(ids)} images are not finite",
            "evaluate in precision fp32; if that does not help, its weights are broken",
        )
    same, right = (int((said == other).sum()) for other in (evaluation.predictions[:, 0], evaluation.labels))
    return evaluation, Agreement(len(ids), same, right, math.fsum(kl.tolist()) / len(ids))


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(softmax(teacher), softmax(student)) of each row in float64: logits [b, C] twice -> [b]."""
    log_p, log_q = (logits.double().log_softmax(1) for logits in (teacher, student))  # [b, C]
    return (log_p.exp() * (log_p - log_q)).sum(1)


def require_same_classes(num_classes: int, of_other: int) -> None:
    """Raise ConfigError unless the two networks have the same number of classes."""
    if num_classes != of_other:
        raise ConfigError(
            f"the model has {num_classes:,} classes and the one of --against {of_other:,}",
            "compare networks with the same classes, or match them to the shards' by name: --subset",
        )
