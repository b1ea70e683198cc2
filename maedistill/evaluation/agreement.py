"""Agreement of two classifiers, a student and its teacher, on the same images, each with its own preprocessing.

    EvaluationImages of TwoViews -> full_pass -> two logits -> Evaluation of the student, Agreement

Image size, crop and normalisation of the two may differ. Each image is decoded once.

    n images   b batch   s, t image sides of student and teacher   C classes
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from maedistill.data.loading.evaluation import EvaluationImages
from maedistill.errors import ConfigError, NumericsError
from maedistill.evaluation.accuracy import Evaluation, best_classes, evaluate_with
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import Predictor
from maedistill.report.formatting import percent


@dataclass(frozen=True)
class Agreement:
    """How often the best classes are equal, and how much the probabilities differ."""

    images: int
    same: int
    teacher_top1: int  # images that the teacher classifies correctly
    kl: float  # KL(teacher, student) at temperature 1 in nats, mean over images: the exact sum, rounded once

    def line(self) -> str:
        """Format the result as one line."""
        same, top1 = (percent(count, self.images) for count in (self.same, self.teacher_top1))
        return f"same best class {same}, KL {self.kl:.4f}; its own top-1 {top1}"

    def metrics(self) -> dict[str, float]:
        """Return the entries for a result file."""
        shares = {"vs_same": self.same / self.images, "vs_top1": self.teacher_top1 / self.images}
        return shares | {"vs_same_images": self.same, "vs_top1_correct": self.teacher_top1, "vs_kl": self.kl}


@dataclass(frozen=True)
class TwoViews:
    """A transform that prepares one image for two networks, in one flat row: RGB -> uint8 [3 s s + 3 t t]."""

    student: Callable[[Image.Image], Tensor]
    teacher: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        """Return both views, concatenated."""
        return torch.cat([self.student(image).flatten(), self.teacher(image).flatten()])


def evaluate_against(
    student: Predictor, teacher: Predictor, images: EvaluationImages, context: EvalContext, *, sizes: tuple[int, int]
) -> tuple[Evaluation, Agreement]:
    """Evaluate both networks once on each image; `TwoViews` is the transform of `images`. Collective.

    sizes: (s, t). The train/eval modes of the networks are restored. Raises the errors of `evaluate`, and ConfigError
    if the numbers of classes differ.
    """

    def classify(pixels: Tensor) -> tuple[Tensor, ...]:
        views = pixels.split([3 * size**2 for size in sizes], dim=1)  # uint8 [b, 3 s s] and [b, 3 t t]
        one, other = (view.unflatten(1, (3, size, size)) for view, size in zip(views, sizes, strict=True))
        logits, teacher_logits = student(one), teacher(other)  # [b, C] both
        if logits.shape != teacher_logits.shape:
            raise ConfigError(
                f"the model has {logits.shape[1]:,} classes and the one of --against {teacher_logits.shape[1]:,}",
                "compare networks with the same classes, or match them to the shards' by name: --subset",
            )
        return logits, best_classes(teacher_logits)[:, 0], divergence(logits, teacher_logits)

    networks = [student.network, teacher.network]
    evaluation, (teacher_best, kl) = evaluate_with(classify, networks, images, context)
    if not kl.isfinite().all():
        raise NumericsError(
            f"the other network's predictions for {int((~kl.isfinite()).sum())} of {len(kl)} images are not finite",
            "evaluate in precision fp32; if that does not help, its weights are broken",
        )
    same, top1 = (int((teacher_best == other).sum()) for other in (evaluation.predictions[:, 0], evaluation.labels))
    return evaluation, Agreement(len(kl), same, top1, math.fsum(kl.tolist()) / len(kl))


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(softmax(teacher), softmax(student)) of each row in float64: logits [b, C] twice -> [b]."""
    log_p, log_q = (logits.double().log_softmax(1) for logits in (teacher, student))  # [b, C]
    return (log_p.exp() * (log_p - log_q)).sum(1)
