"""Distances between student features and teacher features.

B batch   R rows   D width   C channels, which may differ between student and teacher   h, w sides of a map
"""

from torch import Tensor
from torch.nn import functional as F


def feature_loss(student: Tensor, teacher: Tensor, *, distance: str, normalize: str, beta: float = 2.0) -> Tensor:
    """Return the mean distance between student and teacher features of the same shape [B, R, D], in fp32: a scalar.

    distance: `l1` (DMAE), `mse` (AMD), or `smooth_l1`, quadratic below `beta` (G2SD, Feature Distillation).
    normalize: `l2` scales each row of both to unit length (DMAE's released code), `whiten` layer-normalises the
    teacher's rows without affine (Feature Distillation), `none` changes neither (AMD; the formula in the DMAE paper).
    No gradient flows to the teacher's side.
    """
    student, teacher = student.float(), teacher.detach().float()
    if normalize == "l2":
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    elif normalize == "whiten":
        teacher = F.layer_norm(teacher, teacher.shape[-1:])
    else:
        assert normalize == "none"
    if distance == "l1":
        return F.l1_loss(student, teacher)
    if distance == "mse":
        return F.mse_loss(student, teacher)
    assert distance == "smooth_l1"
    return F.smooth_l1_loss(student, teacher, beta=beta)


def attention_transfer_loss(student: Tensor, teacher: Tensor, *, power: int = 2) -> Tensor:
    """Compare activation maps by mean squared error: [B, C, h, w] each -> a scalar (Zagoruyko & Komodakis, 2017).

    A map is the mean over channels of absolute values to the `power`, flattened and scaled to unit length. Both have
    the same h and w.
    """
    predicted, expected = (
        F.normalize(maps.float().abs().pow(power).mean(1).flatten(1), dim=-1) for maps in (student, teacher.detach())
    )  # [B, h*w]
    return F.mse_loss(predicted, expected)
