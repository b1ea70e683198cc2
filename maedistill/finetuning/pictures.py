"""A picture of what the network is trained on: images after augmentation and mixing, with their targets.

m micro-batch   C classes   s image side
"""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from maedistill.report.sheet import tile

_IMAGES = 8
_LEAST_SHARE = 0.05  # of the target; less is label smoothing


def input_sheet(
    images: Tensor, targets: Tensor | None, *, channels: tuple[Tensor, Tensor], classes: Sequence[str], title: str
) -> Image.Image:
    """Draw the first images of a micro-batch in one line, each below its target.

    images: as the network gets them, [m, 3, s, s], normalised with `channels`, mean and std, [3, 1, 1] each.
    targets: [m, C], None without labels. classes: their names; empty if these are unknown.
    """
    mean, std = channels
    shown = images[:_IMAGES] * std + mean
    captions = [_caption(target, classes) for target in targets[:_IMAGES]] if targets is not None else [""] * len(shown)
    return tile([{caption: shown[i : i + 1]} for i, caption in enumerate(captions)], title=title)


def _caption(target: Tensor, classes: Sequence[str]) -> str:
    """Name the classes of a target, [C], the largest share first: `cat 0.72, dog 0.28`."""
    shares = [(share, label) for label, share in enumerate(target.tolist()) if share >= _LEAST_SHARE]
    return ", ".join(f"{classes[label] if classes else label} {share:.2g}" for share, label in sorted(shares)[::-1])
