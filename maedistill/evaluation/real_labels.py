"""ImageNet-ReaL: accuracy against the reassessed labels of the validation images (Beyer et al., 2020).

    ShardIndex -> open_real_labels -> the labels of each image, possibly several or none
    Evaluation, labels -> count_real -> RealCounts

A prediction is correct if it is one of the image's labels. Images without labels are left out. timm ships the labels
by the number in the file name, which make_shards keeps in the sample key: n01440764_ILSVRC2012_val_00000293.
"""

import re
from collections.abc import Sequence
from typing import Any

from timm.data import ImageNetInfo, RealLabelsImagenet

from maedistill.data.shards.index import ShardIndex
from maedistill.errors import ConfigError, DataError
from maedistill.evaluation.accuracy import Evaluation, TopCounts

_IMAGES = 50_000  # of ImageNet's validation set
_FILE = re.compile(r"ILSVRC2012_val_\d{8}(?!\d)")


class RealCounts(TopCounts):
    """Counts over the images that have a reassessed label."""

    def metrics(self) -> dict[str, Any]:
        """Return the entries for a result file."""
        return {f"real_{name}": value for name, value in super().metrics().items()}


def open_real_labels(index: ShardIndex, *, num_classes: int) -> list[frozenset[int]]:
    """Return the reassessed labels of each sample, possibly several or none, for a model of `num_classes`.

    Raises ConfigError unless the classes are ImageNet's 1,000 in their order, DataError for a sample that is not from
    ImageNet's validation set.
    """
    synsets = tuple(ImageNetInfo().label_names())
    if num_classes != len(synsets) or (index.classes and index.classes != synsets):
        reason = f"the model has {num_classes:,}" if num_classes != len(synsets) else "the shards name others"
        raise ConfigError(
            f"--real needs ImageNet's 1,000 classes, and {reason}",
            "leave out --real, or name ImageNet's validation shards",
        )
    table = RealLabelsImagenet(range(_IMAGES)).real_labels  # timm's table only: its scoring needs the files' order
    labels = []
    for i in range(len(index)):
        match = _FILE.search(index.key(i))
        if match is None or not 1 <= int(match[0][-8:]) <= _IMAGES:
            raise DataError(
                f"{index.sample_name(i)} is not an image of ImageNet's validation set: its key has no ILSVRC2012_val_ "
                "number",
                "leave out --real, or write the shards from files that keep their ImageNet names (maedistill shards)",
            )
        labels.append(frozenset(table[f"{match[0]}.JPEG"]))
    return labels


def count_real(evaluation: Evaluation, labels: Sequence[frozenset[int]]) -> RealCounts:
    """Count the correct predictions of an ImageNet-1k classifier. Raises DataError if no image has a label."""
    images = top1 = top5 = 0
    for i, classes in zip(evaluation.ids.tolist(), evaluation.predictions.tolist(), strict=True):
        if right := labels[i]:
            images, top1, top5 = images + 1, top1 + (classes[0] in right), top5 + (not right.isdisjoint(classes))
    if not images:
        raise DataError("none of the images has a label in ImageNet-ReaL", "leave out --real for these few images")
    return RealCounts(images, top1, top5)
