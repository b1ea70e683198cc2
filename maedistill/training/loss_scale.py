"""The dynamic loss scale of fp16: large enough to keep small gradients, halved when large ones overflow.

bf16 and fp32 need none. DeepSpeed's own scaler is not used: with `torch_autocast` in fp16 at ZeRO 1 to 3 (0.19.8) it
does not lower the scale after an overflow, so every later update is skipped, and clipping sees scaled gradients.
"""

from dataclasses import dataclass


@dataclass
class LossScale:
    """A loss scale: `scale` multiplies the loss, `finite_updates` counts the updates since it last changed."""

    scale: float = 2.0**16
    finite_updates: int = 0
    growth_interval: int = 2000

    def update(self, *, finite: bool) -> None:
        """Halve the scale after an overflow, double it after `growth_interval` updates without one."""
        if not finite:
            self.scale, self.finite_updates = self.scale / 2, 0
        elif self.finite_updates + 1 == self.growth_interval:
            self.scale, self.finite_updates = self.scale * 2, 0
        else:
            self.finite_updates += 1
