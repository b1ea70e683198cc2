"""The mean of gradients over ranks, bucket by bucket, while the backward pass still runs (Li et al., VLDB 2020).

DeepSpeed at stage 0 concatenates all gradients after the backward pass and only then reduces them. torch's DDP overlaps
the two, but rebuilds its buckets after the first step of each start. The order of a sum over three or more ranks, and
so its last bit, would then depend on when a run was restarted. Here the parameters alone determine the buckets.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GradientReduction:
    """Averages the gradients of `parameters` over all ranks. Every rank builds it with the same parameters.

    bucket_elements: elements reduced at once; a larger parameter gets a bucket of its own.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, bucket_elements: int) -> None:
        # Buckets from last to first: roughly the order in which a backward pass reaches the parameters.
        self._buckets: list[list[nn.Parameter]] = []
        room = 0
        for parameter in reversed(parameters):
            if not self._buckets or parameter.numel() > room:
                self._buckets.append([])
                room = bucket_elements
            self._buckets[-1].append(parameter)
            room -= parameter.numel()
        self._bucket_of = {parameter: i for i, bucket in enumerate(self._buckets) for parameter in bucket}
        self._missing: list[int] = []  # gradients that each bucket still waits for
        self._launched = 0
        self._under_way: list[tuple[Tensor, dist.Work]] = []
        self._armed = False
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._ready)

    def begin(self) -> None:
        """Reduce during the next backward pass, which is the last one of an update."""
        self._missing = [len(bucket) for bucket in self._buckets]
        self._launched, self._armed = 0, True

    def finish(self) -> None:
        """Wait until `grad` of every parameter is the mean over ranks. On a GPU the stream waits, not the host."""
        while self._launched < len(self._buckets):
            self._launch()  # some of its parameters have no gradient
        for flat, work in self._under_way:
            work.wait()
            flat.div_(dist.get_world_size())
        self._under_way, self._armed = [], False

    def _ready(self, parameter: nn.Parameter) -> None:
        """Handle autograd's signal that a gradient is complete. All ranks launch buckets in the same order."""
        if not self._armed:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while self._launched < len(self._buckets) and not self._missing[self._launched]:
            self._launch()

    @torch.no_grad()
    def _launch(self) -> None:
        """Start reducing one bucket. Its gradients become views of the reduced buffer, so nothing is copied back."""
        gradients = {p: p.grad for p in self._buckets[self._launched] if p.grad is not None}
        self._launched += 1
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
        for parameter, part in zip(gradients, flat.split([p.numel() for p in gradients]), strict=True):
            parameter.grad = part.view_as(parameter)
        self._under_way.append((flat, dist.all_reduce(flat, async_op=True)))
