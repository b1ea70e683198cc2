"""Supervised fine-tuning (He et al., CVPR 2022, appendix A.1): a network with a classifier, trained on labels.

B batch   C classes   s image side
"""

from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maedistill.methods.mae import Losses


class Supervised(nn.Module):
    """Cross-entropy with soft targets. `vit` is an unmodified timm network, so that an export changes nothing."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        self.cross_entropy = SoftTargetCrossEntropy()

    def forward(self, images: Tensor, targets: Tensor) -> Losses:
        """Return scalar losses. images: normalised, mixed, [B, 3, s, s]. targets: rows that sum to 1, [B, C]."""
        logits = self.vit(images).float()  # [B, C]
        loss = self.cross_entropy(logits, targets)
        return {"loss": loss, "cross_entropy": loss}
