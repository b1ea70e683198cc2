"""Response-based distillation: losses that compare a student's logits with a teacher's.

No gradient flows to the teacher's side. Divergences are summed over classes and averaged over the batch.

B batch   C classes
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Decoupled(NamedTuple):
    """The two parts of `decoupled_divergence`, each a scalar."""

    target: Tensor  # TCKD: the label against all other classes
    others: Tensor  # NCKD: the distribution among the other classes


def standardize(logits: Tensor) -> Tensor:
    """Return the z-scores of each row, with the unbiased standard deviation: [B, C] -> [B, C] (Sun et al., CVPR 2024).

    For a > 0, a z + b has the same z-scores as z: a student need not match the scale and shift of its teacher's logits.
    """
    deviation, mean = torch.std_mean(logits.float(), dim=-1, keepdim=True)
    return (logits - mean) / (deviation + 1e-7)


def kd_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Return T^2 KL(softmax(teacher / T), softmax(student / T)): a scalar (Hinton et al., 2015).

    The factor T^2 keeps the gradient's size for any T.
    """
    expected = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    predicted = F.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * _divergence(predicted, expected)


def decoupled_divergence(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float) -> Decoupled:
    """Return DKD's two parts, T^2 included (Zhao et al., CVPR 2022). labels: int64 [B].

    At T = 1, KL = target + (1 - p) others in each row, where p is the teacher's probability of the label.
    """
    target_s, others_s = _decouple(student.float() / temperature, labels)
    target_t, others_t = _decouple(teacher.detach().float() / temperature, labels)
    return Decoupled(
        target=temperature**2 * _divergence(target_s, target_t),
        others=temperature**2 * _divergence(others_s, others_t),
    )


def hard_label_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross-entropy with the teacher's most likely class: a scalar (DeiT, Touvron et al., 2021)."""
    return F.cross_entropy(student.float(), teacher.detach().argmax(dim=-1))


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher, student) of log-probabilities, [B, C] each, averaged over the batch: a scalar."""
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _decouple(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the label against all others, [B, 2], and among the others, [B, C - 1].

    They are gathered by index: the size of a boolean mask's result depends on the data, so the host would wait for it.
    """
    places = torch.arange(logits.shape[-1] - 1, device=logits.device)  # [C - 1]
    others = logits.gather(1, places + (places >= labels[:, None]))  # [B, C - 1]
    own = logits.gather(1, labels[:, None])  # [B, 1]
    pair = torch.cat([own, others.logsumexp(dim=-1, keepdim=True)], dim=-1)  # [B, 2]
    return F.log_softmax(pair, dim=-1), F.log_softmax(others, dim=-1)
