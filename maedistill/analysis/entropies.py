"""How much each cell of an image may vary before a network's features change, as an entropy (Cheng et al., 2020).

    x' = x + sigma * noise, with one sigma per cell     H = log sigma + log(2 pi e) / 2, the entropy of a cell in nats
    the sigmas minimise E |f(x') - f(x)|^2, while the mean H of the image's cells is the target

A low H says that the network needs the cell. The paper weighs the mean H by a lambda and looks for one that meets its
target. Here the constraint is met after every step of Adam on log sigma: bisection finds the one number to add to all
of them (of a linear network: half the logarithm of lambda). The minimum is the same, for every network at the target.

    B images   n = g*g cells   m draws of noise   s image side   D width of the features
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maedistill.randomness import Stream, key, normal

Features = Callable[[Tensor], Tensor]  # pixels [b, 3, s, s] -> features [b, D]; pixels are in [0, 1] but for the noise
Noise = Callable[[int, Tensor, int, tuple[int, ...]], Tensor]  # see `gaussian`

LEAST_SIGMA, MOST_SIGMA = 0.001, 1.0  # the paper's: the range of pixels, and less than one of their 256 levels
_LOW, _HIGH = math.log(LEAST_SIGMA), math.log(MOST_SIGMA)
OF_UNIT = 0.5 * math.log(2 * math.pi * math.e)  # entropy where sigma is 1
_BETAS = (0.5, 0.9)  # of Adam: its memory has to be shorter than the few steps
_REACH = 5.0  # that a log sigma can move in all steps together, as the rate falls to 0; from one bound to most others


@dataclass(frozen=True)
class EntropySpec:
    """entropy: mean over the cells of an image, in nats. draws: of noise in each step. seed: of the noise."""

    entropy: float = -2.8
    steps: int = 50
    draws: int = 32
    seed: int = 0


def gaussian(seed: int, ids: Tensor, step: int, shape: tuple[int, ...]) -> Tensor:
    """Return noise [B, *shape], a function of seed, image and step: all networks see the same. ids: int64 [B]."""
    return normal(key(seed, step), ids, Stream.NOISE, n=math.prod(shape)).unflatten(1, shape)


def cell_entropies(
    features: Features, pixels: Tensor, ids: Tensor, *, grid: int, spec: EntropySpec, noise: Noise = gaussian
) -> tuple[Tensor, Tensor]:
    """Return the entropy of each cell, [B, n], row by row from the top left, and the change of the features [B].

    pixels: [B, 3, s, s] in [0, 1], s a multiple of grid. ids: int64 [B], of the images. The mean of each row is the
    target within 1e-5. The change is the mean squared distance in the last step: 0 if the features ignore the image.
    """
    mean, shape = spec.entropy - OF_UNIT, (spec.draws, *pixels.shape[1:])
    log_sigma = pixels.new_full((len(pixels), grid * grid), mean)  # [B, n]
    optimizer = torch.optim.Adam([log_sigma], betas=_BETAS)
    change = log_sigma.new_zeros(len(pixels))
    tf32_off = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with tf32_off, torch.no_grad():
        clean = features(pixels)  # [B, D]
        for step in range(spec.steps):
            draws = noise(spec.seed, ids, step, shape)  # [B, m, 3, s, s]
            change, share = _shares(features, pixels, clean, draws, log_sigma, grid=grid)
            is_free = (log_sigma > _LOW + 1e-6) & (log_sigma < _HIGH - 1e-6)
            # at the minimum all cells that are at no bound have the same share, which is lambda but for a factor
            common = (share * is_free).sum(1, keepdim=True) / is_free.sum(1, keepdim=True).clamp(min=1)
            log_sigma.grad = share - common
            decay = 0.5 * (1 + math.cos(math.pi * (step + 0.5) / spec.steps))
            optimizer.param_groups[0]["lr"] = 2 * _REACH / spec.steps * decay
            optimizer.step()
            log_sigma.copy_(with_mean(log_sigma, mean))
    return log_sigma + OF_UNIT, change


def with_mean(log_sigma: Tensor, mean: float) -> Tensor:
    """Add one number to each row, cut at the bounds, so that its mean is `mean`: [B, n] -> [B, n]."""
    values = log_sigma.double()
    low, high = _LOW - values.amax(1, keepdim=True), _HIGH - values.amin(1, keepdim=True)  # [B, 1]
    for _ in range(60):
        middle = (low + high) / 2
        is_below = (values + middle).clamp(_LOW, _HIGH).mean(1, keepdim=True) < mean
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (values + high).clamp(_LOW, _HIGH).to(log_sigma.dtype)


def _shares(
    features: Features, pixels: Tensor, clean: Tensor, draws: Tensor, log_sigma: Tensor, *, grid: int
) -> tuple[Tensor, Tensor]:
    """Return the change of the features [B], and how much of it each cell makes: [B, n], of mean 1 if linear."""
    repeats = pixels.shape[-1] // grid
    with torch.enable_grad():
        leaf = log_sigma.detach().requires_grad_()
        sigma = leaf.exp().unflatten(1, (1, 1, grid, grid))  # [B, 1, 1, g, g]
        sigma = sigma.repeat_interleave(repeats, -1).repeat_interleave(repeats, -2)  # [B, 1, 1, s, s]
        noisy = pixels[:, None] + sigma * draws  # [B, m, 3, s, s]
        moved = features(noisy.flatten(0, 1)).unflatten(0, draws.shape[:2]) - clean[:, None]  # [B, m, D]
        change = moved.square().sum(-1).mean(1)  # [B]
        (gradient,) = torch.autograd.grad(change.sum(), leaf)
    share = gradient * (log_sigma.shape[1] / 2) / change[:, None]
    return change.detach(), share.where(change[:, None] > 0, 0.0)
