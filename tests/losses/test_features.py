"""Feature distances against plain loops, and what each normalisation leaves alone."""

import math

import pytest
import torch

from maedistill.losses.features import feature_loss


def rows(seed: int) -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def by_loop(student: torch.Tensor, teacher: torch.Tensor, distance: str, normalize: str) -> float:
    total, count = 0.0, 0
    for s, t in zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), strict=True):
        if normalize == "l2":
            s, t = ([x / math.sqrt(sum(y * y for y in row)) for x in row] for row in (s, t))
        elif normalize == "whiten":
            centre = sum(t) / len(t)
            scale = math.sqrt(sum((x - centre) ** 2 for x in t) / len(t) + 1e-5)
            t = [(x - centre) / scale for x in t]
        for a, b in zip(s, t, strict=True):
            d = abs(a - b)
            smooth = d * d / 4 if d < 2 else d - 1
            total += {"l1": d, "mse": d * d, "smooth_l1": smooth}[distance]
            count += 1
    return total / count


@pytest.mark.parametrize("distance", ["l1", "mse", "smooth_l1"])
@pytest.mark.parametrize("normalize", ["none", "l2", "whiten"])
def test_equals_a_loop(distance: str, normalize: str) -> None:
    student, teacher = rows(0), rows(1)
    loss = feature_loss(student, teacher, distance=distance, normalize=normalize)
    assert float(loss) == pytest.approx(by_loop(student, teacher, distance, normalize), rel=1e-5)


def test_only_the_student_gets_a_gradient() -> None:
    student, teacher = rows(0).requires_grad_(), rows(1).requires_grad_()
    feature_loss(student, teacher, distance="l1", normalize="l2").backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_normalised_forms_ignore_the_scale_that_they_remove() -> None:
    student, teacher = rows(0), rows(1)
    for normalize, moved in (("l2", (3 * student, 5 * teacher)), ("whiten", (student, 50 * teacher + 2))):
        before = feature_loss(student, teacher, distance="mse", normalize=normalize)
        torch.testing.assert_close(feature_loss(*moved, distance="mse", normalize=normalize), before, rtol=1e-4, atol=0)


def test_half_precision_features_are_compared_in_fp32() -> None:
    student, teacher = rows(0).bfloat16(), rows(1).bfloat16()
    loss = feature_loss(student, teacher, distance="mse", normalize="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (student.float() - teacher.float()).square().mean())
