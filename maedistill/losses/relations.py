"""How the rows of a batch, or the tokens of an image, stand to each other: relation-based distillation.

Relations of one kind have the same shape for student and teacher, whatever their widths are, so nothing is projected.
The teacher's side carries no gradient. Contrast is the exception in both: it compares two projections that are learned.
Relations between images see one micro-batch of one rank.

B batch   D width, which may differ between student and teacher   H heads   M tokens   d width of a head
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from maedistill.machine import without_autocast

_LEAST_SQUARE = 1e-12  # of a distance, so that its root has a gradient
_TINY = 1e-7


class TokenRelations(NamedTuple):
    """The two parts of `token_relations`, each a scalar."""

    qk: Tensor  # how queries relate to keys
    vv: Tensor  # how values relate to values


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD's distances of all pairs, in units of their mean: [B, D] each -> a scalar (Park et al., CVPR 2019)."""
    expected, predicted = _relative_distances(teacher.detach().float()), _relative_distances(student.float())
    return F.smooth_l1_loss(predicted, expected)


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD's cosines of the angles in all triplets: [B, D] each -> a scalar (Park et al., CVPR 2019).

    It takes B^3 and B^2 D numbers, several of each: about a gigabyte at 256 images and D = 768, forward and backward.
    """
    return F.smooth_l1_loss(_angles(student.float()), _angles(teacher.detach().float()))


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """PKT: divergence of each image's affinities to all: [B, D] each -> a scalar (Passalis & Tefas, ECCV 2018).

    It stays the same when either side is rotated or scaled.
    """
    predicted, expected = _affinities(student.float()), _affinities(teacher.detach().float())  # [B, B]
    return (expected * ((expected + _TINY) / (predicted + _TINY)).log()).mean()


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of row-normalised Gram matrices: [B, D] each -> a scalar (Tung & Mori, ICCV 2019)."""
    predicted, expected = (
        F.normalize(rows @ rows.T, dim=-1) for rows in (student.float(), teacher.detach().float())
    )  # [B, B]
    return F.mse_loss(predicted, expected)


def contrast_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE both ways: each image finds itself among the other side's: [B, d] each, projected -> a scalar.

    The aim of CRD (Tian et al., ICLR 2020) by other means: not against a memory bank, but against all others of the
    micro-batch, of the same class, too. log B - loss is a lower bound of the information that both sides share (van den
    Oord et al., 2018), so B limits what it can see. Rows have no scale, only cosines count; d is their width.
    """
    cosines = F.normalize(student.float(), dim=-1) @ F.normalize(teacher.float(), dim=-1).mT  # [B, B]
    logits, own = cosines / temperature, torch.arange(len(cosines), device=cosines.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2


def token_relation_loss(student: Tensor, teacher: Tensor, *, other: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Divergence of how tokens attend to tokens: [B, H, M, d] each -> a scalar (MiniLM; TinyMIM).

    Rows are softmax(A A' / sqrt d), or softmax(A other' / sqrt d) with `other` (student's, teacher's): queries, keys.
    Student and teacher have the same heads here: see `merge_heads`. Averaged over images, heads and tokens.
    """
    against = other or (student, teacher)
    predicted, expected = (
        F.log_softmax(rows.float() @ columns.float().mT / rows.shape[-1] ** 0.5, dim=-1)
        for rows, columns in zip((student, teacher.detach()), (against[0], against[1].detach()), strict=True)
    )  # [B, H, M, M]
    return F.kl_div(predicted.flatten(0, 2), expected.flatten(0, 2), reduction="batchmean", log_target=True)


def token_relations(student: Sequence[Tensor], teacher: Sequence[Tensor], *, heads: int) -> TokenRelations:
    """TinyMIM's two terms, from queries, keys and values of student and teacher, [B, H, M, d] each.

    Both are cut into `heads`, which divides either width. No autocast: in bf16 small differences would be lost.
    """
    (query, key, value), (*expected, expected_value) = (
        [merge_heads(part.float(), heads) for part in side] for side in (student, teacher)
    )
    with without_autocast(query):
        return TokenRelations(
            token_relation_loss(query, expected[0], other=(key, expected[1])),
            token_relation_loss(value, expected_value),
        )


def merge_heads(rows: Tensor, heads: int) -> Tensor:
    """The same width cut into other heads, as unequal networks need: [B, H, M, d] -> [B, heads, M, H d / heads]."""
    batch, old, tokens, width = rows.shape
    return rows.transpose(1, 2).reshape(batch, tokens, heads, old * width // heads).transpose(1, 2)


def _relative_distances(rows: Tensor) -> Tensor:
    """Euclidean distances of all pairs over the mean of the positive ones, the diagonal 0: [B, D] -> [B, B]."""
    squares = rows.square().sum(dim=1)  # [B]
    square = (squares[:, None] + squares[None] - 2 * rows @ rows.T).clamp(min=_LEAST_SQUARE)  # [B, B]
    distances = square.sqrt() * (1 - torch.eye(len(rows), device=rows.device))
    positive = distances > 0
    return distances / (distances.sum() / positive.sum())


def _angles(rows: Tensor) -> Tensor:
    """cos of the angle at i between the directions to j and k: [B, D] -> [B, B, B]. Equal rows have no direction: 0."""
    gaps = rows[None] - rows[:, None]  # [B, B, D]
    lengths = gaps.norm(dim=-1, keepdim=True)  # [B, B, 1]
    directions = gaps * torch.where(lengths > _TINY, 1 / lengths.clamp(min=_TINY), 0.0)
    return directions @ directions.mT


def _affinities(rows: Tensor) -> Tensor:
    """(1 + cosine) / 2 of all pairs, each row summing to 1: [B, D] -> [B, B]."""
    unit = F.normalize(rows, dim=-1)
    cosines = (unit @ unit.T + 1) / 2
    return cosines / cosines.sum(dim=1, keepdim=True)
