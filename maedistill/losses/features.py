"""Distances between student features and teacher features.

B batch   R rows   D width   C channels, which may differ between student and teacher   h, w sides of a map
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def feature_loss(student: Tensor, teacher: Tensor, *, distance: str, normalize: str, eps: float = 1e-5) -> Tensor:
    """Return the mean distance between student and teacher features of the same shape [B, R, D], in fp32: a scalar.

    distance: `l1` (DMAE), `mse` (AMD), `smooth_l1` with beta 2, quadratic below it (G2SD, Feature Distillation), or
    `cosine_smooth_l1`, 0.9 (1 - cosine of the rows) + 0.1 smooth L1 with beta 1 (Theia, EUPE).
    normalize: `l2` scales each row of both to unit length (DMAE's released code), `whiten` layer-normalises the
    teacher's rows without affine, with `eps` (Feature Distillation), `none` changes neither (AMD; the formula in the
    DMAE paper); nor does `stored`, whose teacher's rows are standardised already (methods/statistics.py).
    No gradient flows to the teacher's side.
    """
    student, teacher = student.float(), teacher.detach().float()
    if normalize == "l2":
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    elif normalize == "whiten":
        teacher = F.layer_norm(teacher, teacher.shape[-1:], eps=eps)
    else:
        assert normalize in ("none", "stored")
    if distance == "l1":
        return F.l1_loss(student, teacher)
    if distance == "mse":
        return F.mse_loss(student, teacher)
    if distance == "smooth_l1":
        return F.smooth_l1_loss(student, teacher, beta=2.0)
    assert distance == "cosine_smooth_l1"
    cosine = F.cosine_similarity(student, teacher, dim=-1).mean()
    return 0.9 * (1 - cosine) + 0.1 * F.smooth_l1_loss(student, teacher)


def mean_of_blocks(outputs: Sequence[Tensor]) -> Tensor:
    """Return the layer norm of the mean of the layer-normed outputs of several blocks, in fp32: [B, R, D].

    After data2vec (Baevski et al., 2022). No block outweighs the others; the norms have no affine, and eps 1e-6.
    """
    shape = outputs[0].shape[-1:]
    normed = torch.stack([F.layer_norm(output.float(), shape, eps=1e-6) for output in outputs])
    return F.layer_norm(normed.mean(dim=0), shape, eps=1e-6)


def attention_transfer_loss(student: Tensor, teacher: Tensor, *, power: int = 2) -> Tensor:
    """Compare activation maps by mean squared error: [B, C, h, w] each -> a scalar (Zagoruyko & Komodakis, 2017).

    A map is the mean over channels of absolute values to the `power`, flattened and scaled to unit length. Both have
    the same h and w.
    """
    predicted, expected = (
        F.normalize(maps.float().abs().pow(power).mean(1).flatten(1), dim=-1) for maps in (student, teacher.detach())
    )  # [B, h*w]
    return F.mse_loss(predicted, expected)
