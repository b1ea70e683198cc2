"""The past as teacher: an earlier state of the trained network predicts on the images of the step itself.

    ema       the run's moving average, as it is before the step
    weights   the network as it was when the current epoch began; checkpoints keep it (`past.safetensors`)

After PS-KD (Kim et al., ICCV 2021), which itself takes stored predictions of an epoch ago: `Predictions` in
predictions.py has the same methods, `begin`, `outputs`, `add`.
What is made of the predictions is in `self_terms.py`. Which step has which past is a function of the step alone.

B batch   C classes   s image side
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from maedistill.config.distill import PastConfig
from maedistill.config.plan import Plan
from maedistill.data.loading.batch import Batch
from maedistill.data.loading.order import SampleOrder
from maedistill.finetuning.outputs import Outputs
from maedistill.machine import Precision, autocast
from maedistill.runs.run import Run


class Past(nn.Module):
    """Predictions of an earlier state of the network, outside the engine, and their share of the targets over time."""

    shares: Tensor

    def __init__(
        self, section: PastConfig, network: nn.Module, *, plan: Plan, epochs: float, precision: Precision
    ) -> None:
        """Copy the network as it is. epochs: of the run; precision: the run's number format."""
        super().__init__()
        self.section, self.precision = section, precision
        self.network = deepcopy(network).eval().requires_grad_(False)
        each = [plan.epoch_of(step) for step in range(plan.steps)]
        # A compiled step takes an entry of this table as input: it neither waits for the host nor recompiles.
        shares = [section.share_at(epoch, epochs) for epoch in each]
        self.register_buffer("shares", torch.tensor(shares, dtype=torch.float32), persistent=False)
        begins = [epoch > before for before, epoch in zip([0, *each], each, strict=False)]
        self._begun = -1  # the last step that made the network the past
        self._begins = [section.source == "weights" and begin for begin in begins]
        self._counts = [
            section.weight_at(plan.epoch_at(step)) > 0 and (epoch > 0 or section.source == "ema")
            for step, epoch in enumerate(each)
        ]

    @property
    def extra_networks(self) -> dict[str, nn.Module]:
        """Return what checkpoints have to keep, by file name."""
        return {"past": self.network} if self.section.source == "weights" else {}

    def begin(self, run: Run, order: SampleOrder) -> None:
        """Take the network of the run's moving average, if that is the past."""
        if self.section.source == "ema":
            assert run.ema is not None  # a rule of the config requires it
            self.network = run.ema.module.vit

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities [B, C] of images [B, 3, s, s]."""
        return self.network(images).float().softmax(dim=-1)

    @torch.no_grad()
    def outputs(self, images: Tensor, step: int, *, batch: Batch | None, now: nn.Module) -> Outputs:
        """Return the past's probabilities [B, C] and their share; nothing in a step without a past.

        now: the network in training. In the first step of an epoch it becomes the past, as it is before the step's
        first micro-batch: a forward pass may change running statistics.
        """
        if self._begins[step] and step != self._begun:
            self._begun = step
            self.network.load_state_dict(now.state_dict())
        if not self._counts[step]:
            return {}
        with autocast(images.device, self.precision):
            return {"past": self(images), "share": self.shares[step]}

    def add(self, batch: Batch, losses: dict[str, Tensor]) -> None:
        """Store nothing."""
