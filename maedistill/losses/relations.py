"""Relation-based distillation: losses on relations between the images of a batch, or between the tokens of an image.

Relations of one kind have the same shape for student and teacher, whatever their widths are, so nothing is projected.
No gradient flows to the teacher's side. `contrast_loss` is the exception to both: it compares two learned projections.
Relations between images stay within one micro-batch of one rank.

B batch   D width, which may differ between student and teacher   H heads   M tokens   d width of a head
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from maedistill.machine import without_autocast

_LEAST_SQUARE = 1e-12  # lower bound of a squared distance, so that its root has a finite gradient
_TINY = 1e-7


class RelationLosses(NamedTuple):
    """The two parts of `token_relations`, each a scalar."""

    qk: Tensor  # query-key relations
    vv: Tensor  # value-value relations


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare distances of all pairs, in units of their mean: [B, D] each -> a scalar (RKD, Park et al., CVPR 2019)."""
    expected, predicted = _relative_distances(teacher.detach().float()), _relative_distances(student.float())
    return F.smooth_l1_loss(predicted, expected)


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the cosines of the angles in all triplets: [B, D] each -> a scalar (RKD, Park et al., CVPR 2019).

    It needs several tensors of B^3 and of B^2 D numbers: about 1 GB at B = 256 and D = 768, forward and backward.
    """
    return F.smooth_l1_loss(_angles(student.float()), _angles(teacher.detach().float()))


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare each image's affinities to all images: [B, D] each -> a scalar (PKT, Passalis & Tefas, ECCV 2018).

    It does not change when either side is rotated or scaled.
    """
    predicted, expected = _affinities(student.float()), _affinities(teacher.detach().float())  # [B, B]
    return (expected * ((expected + _TINY) / (predicted + _TINY)).log()).mean()


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare row-normalised Gram matrices by squared error: [B, D] each -> a scalar (Tung & Mori, ICCV 2019)."""
    predicted, expected = (
        F.normalize(rows @ rows.T, dim=-1) for rows in (student.float(), teacher.detach().float())
    )  # [B, B]
    return F.mse_loss(predicted, expected)


def contrast_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Return InfoNCE in both directions between paired images: [B, d] each, projected -> a scalar.

    It has CRD's aim (Tian et al., ICLR 2020) with other negatives: not a memory bank, but all other images of the
    micro-batch, including those of the same class. log B - loss is a lower bound of the information that both sides
    share (van den Oord et al., 2018), so B limits what it can measure. Rows, of width d, are scaled to unit length.
    """
    cosines = F.normalize(student.float(), dim=-1) @ F.normalize(teacher.float(), dim=-1).mT  # [B, B]
    logits, labels = cosines / temperature, torch.arange(len(cosines), device=cosines.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)) / 2


def relation_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Return the divergence of token-to-token attention: (A, B), [B, H, M, d] each -> a scalar (MiniLM; TinyMIM).

    A relation is softmax(A B' / sqrt d), of queries to keys or of values to values. Both sides must have the same
    heads: see `merge_heads`. The mean is over images, heads and tokens.
    """
    predicted, expected = (
        F.log_softmax(a.float() @ b.float().mT / a.shape[-1] ** 0.5, dim=-1) for a, b in (student, teacher)
    )  # [B, H, M, M]
    return F.kl_div(predicted.flatten(0, 2), expected.detach().flatten(0, 2), reduction="batchmean", log_target=True)


def token_relations(student: Sequence[Tensor], teacher: Sequence[Tensor], *, num_heads: int) -> RelationLosses:
    """Return TinyMIM's two terms from the queries, keys and values of student and teacher, [B, H, M, d] each.

    Both sides are split into `num_heads`, which divides both widths. Autocast is off: bf16 loses small differences.
    """
    q_s, k_s, v_s = (merge_heads(x.float(), num_heads) for x in student)  # [B, num_heads, M, D / num_heads]
    q_t, k_t, v_t = (merge_heads(x.detach().float(), num_heads) for x in teacher)
    with without_autocast(q_s):
        return RelationLosses(
            qk=relation_loss((q_s, k_s), (q_t, k_t)),
            vv=relation_loss((v_s, v_s), (v_t, v_t)),
        )


def merge_heads(rows: Tensor, num_heads: int) -> Tensor:
    """Split the same width into other heads, for unequal networks: [B, H, M, d] -> [B, heads, M, H d / heads]."""
    batch, old, tokens, width = rows.shape
    return rows.transpose(1, 2).reshape(batch, tokens, num_heads, old * width // num_heads).transpose(1, 2)


def _relative_distances(rows: Tensor) -> Tensor:
    """Return Euclidean distances of all pairs over the mean of the positive ones: [B, D] -> [B, B], diagonal 0."""
    squares = rows.square().sum(dim=1)  # [B]
    square = (squares[:, None] + squares[None] - 2 * rows @ rows.T).clamp(min=_LEAST_SQUARE)  # [B, B]
    distances = square.sqrt() * (1 - torch.eye(len(rows), device=rows.device))
    positive = distances > 0
    return distances / (distances.sum() / positive.sum())


def _angles(rows: Tensor) -> Tensor:
    """Return the cosine of the angle at i between the directions to j and k, 0 for equal rows: [B, D] -> [B, B, B]."""
    gaps = rows[None] - rows[:, None]  # [B, B, D]
    lengths = gaps.norm(dim=-1, keepdim=True)  # [B, B, 1]
    directions = gaps * torch.where(lengths > _TINY, 1 / lengths.clamp(min=_TINY), 0.0)
    return directions @ directions.mT


def _affinities(rows: Tensor) -> Tensor:
    """Return (1 + cosine) / 2 of all pairs, scaled so that each row sums to 1: [B, D] -> [B, B]."""
    unit = F.normalize(rows, dim=-1)
    cosines = (unit @ unit.T + 1) / 2
    return cosines / cosines.sum(dim=1, keepdim=True)
