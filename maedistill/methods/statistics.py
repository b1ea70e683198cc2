"""Statistics of a teacher's channels, measured in the first steps of a run and fixed from then on (as in Theia, EUPE).

Within a step all micro-batches of all ranks are standardised by what the earlier steps measured, so that the layout of
a run changes nothing but rounding. Sums are float64, and checkpoints keep them.

B batch   T patches visible to the teacher   Q its prefix tokens   K taps   D_t teacher width
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maedistill.processes.distributed import all_reduce_tensor

_LEAST = 0.01  # deviation of a channel, as a share of the tap's mean one


class ChannelStatistics(nn.Module):
    """Standardises the targets of each tap by the mean and deviation of each channel over patches, prefix left out."""

    sums: Tensor
    pending: Tensor

    def __init__(self, taps: Sequence[int], *, width: int, prefix: int, steps: int) -> None:
        """Measure the first `steps` steps."""
        super().__init__()
        self.taps, self.prefix, self.steps = tuple(taps), prefix, steps
        zeros = torch.zeros(3, len(taps), width, dtype=torch.float64)  # rows, their sum, the sum of their squares
        self.register_buffer("sums", zeros)  # [3, K, D_t], of all ranks, up to the step before
        self.register_buffer("pending", zeros.clone(), persistent=False)  # of this rank, of this step

    @property
    def measured(self) -> Tensor:
        """Return whether anything was measured: a scalar."""
        return (self.sums[0] > 0).all()

    @torch.no_grad()
    def forward(self, target: dict[int, Tensor]) -> dict[int, Tensor]:
        """Standardise {tap: [B, Q + T, D_t]}, in fp32; before anything was measured, change nothing."""
        count, total, squares = self.sums
        mean = total / count.clamp(min=1)
        std = (squares / count.clamp(min=1) - mean.square()).clamp(min=1e-12).sqrt()
        # A channel that was silent so far, as after a ReLU, would blow up when it fires.
        std = std.clamp(min=_LEAST * std.mean(dim=-1, keepdim=True)).where(count > 0, 1.0)
        return {t: (target[t].float() - mean[k].float()) / std[k].float() for k, t in enumerate(self.taps)}

    @torch.no_grad()
    def add(self, target: dict[int, Tensor], step: int) -> None:
        """Measure a micro-batch of `step`."""
        for k, tap in enumerate(self.taps if step < self.steps else ()):
            rows = target[tap][:, self.prefix :].float().flatten(0, 1)  # [B * T, D_t]
            self.pending[0, k] += len(rows)
            self.pending[1, k] += rows.sum(0, dtype=torch.float64)
            self.pending[2, k] += rows.square().sum(0, dtype=torch.float64)

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        """Count what all ranks measured in `step`, unless it is not finite. Collective."""
        if step < self.steps:
            measured = all_reduce_tensor(self.pending)
            self.sums += measured.where(measured.isfinite().all(), 0.0)
            self.pending.zero_()
