"""Online and self-distillation: losses in which a network learns from its peers, its depths or its past.

No gradient flows to the side that teaches. Divergences are summed over classes and averaged over the batch.

K peers   B batch   C classes   N tokens   D width
"""

from collections.abc import Sequence
from itertools import pairwise
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from maedistill.losses.logits import kd_loss


def mutual_loss(own: Tensor, peers: Sequence[Tensor]) -> Tensor:
    """Return the mean over peers of KL(p_peer || p_own) at T = 1: a scalar (Zhang et al., CVPR 2018). Logits [B, C]."""
    return torch.stack([kd_loss(own, peer, temperature=1.0) for peer in peers]).mean()


def codistillation_loss(own: Tensor, peers: Sequence[Tensor]) -> Tensor:
    """Return KL(mean over peers of p_peer || p_own): a scalar (Anil et al., ICLR 2018). Logits [B, C]."""
    each = torch.stack([F.log_softmax(peer.detach().float(), dim=-1) for peer in peers])  # [K, B, C]
    mean = each.logsumexp(dim=0) - log(len(peers))  # [B, C]
    return F.kl_div(F.log_softmax(own.float(), dim=-1), mean, reduction="batchmean", log_target=True)


def energy_map(tokens: Tensor) -> Tensor:
    """Return where a block's activations are strong, as a distribution over patch tokens: [B, N, D] -> [B, N].

    The energy of a token is its sum of squares. It is divided by its own standard deviation over the tokens, without
    which the softmax of a wide block would be one-hot and its gradient zero.
    """
    energy = tokens.float().square().sum(dim=-1)  # [B, N]
    deviation = energy.std(dim=-1, keepdim=True, correction=0)
    return (energy / (deviation + 1e-6)).softmax(dim=-1)


def self_attention_loss(tokens: Sequence[Tensor]) -> Tensor:
    """Return the mean squared difference of each block's energy map to the next one's: a scalar.

    This is SAD (Hou et al., ICCV 2019) on a ViT's patch tokens. tokens: of blocks from shallow to deep, [B, N, D] each.
    """
    maps = [energy_map(one) for one in tokens]
    return torch.stack([F.mse_loss(shallow, deep.detach()) for shallow, deep in pairwise(maps)]).mean()


def past_target(targets: Tensor, past: Tensor, *, alpha: float | Tensor) -> Tensor:
    """Mix targets with what the network predicted an epoch ago (PS-KD, Kim et al., ICCV 2021): [B, C].

    targets, past: rows that sum to 1, [B, C]. alpha: share of the past, alpha_T (e + 1) / E in epoch e of E, or each
    row's, [B, 1].
    """
    return (1 - alpha) * targets + alpha * past
