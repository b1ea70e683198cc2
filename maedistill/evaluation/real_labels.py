"""ImageNet-ReaL: accuracy against the reassessed labels of the validation images (Beyer et al., 2020).

    ShardIndex -> open_real_labels -> the labels of each image, possibly several or none
    Evaluation -> RealLabels.score -> RealScore

A prediction is correct if it is one of the image's labels. Images without labels are left out. timm ships the labels
by the number in the file name, which make_shards keeps in the sample key: n01440764_ILSVRC2012_val_00000293.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from timm.data import ImageNetInfo, RealLabelsImagenet

from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.reader import sample_name
from maedistill.errors import ConfigError, DataError
from maedistill.evaluation.accuracy import Evaluation

_IMAGES = 50_000  # of ImageNet's validation set
_FILE = re.compile(r"ILSVRC2012_val_\d{8}(?!\d)")


@dataclass(frozen=True)
class RealScore:
    """Counts over the images that have a reassessed label."""

    images: int
    top1: int
    top5: int

    def line(self) -> str:
        """Format the result as one line."""
        top1, top5 = (
            f"{100 * count / self.images:.2f} % ({count} of {self.images})" for count in (self.top1, self.top5)
        )
        return f"top-1 {top1}, top-5 {top5}, against ImageNet-ReaL's labels"

    def facts(self) -> dict[str, int]:
        """Return the entries for a result file."""
        return {"real_images": self.images, "real_top1": self.top1, "real_top5": self.top5}


@dataclass(frozen=True)
class RealLabels:
    """The reassessed labels of each sample id, possibly several or none."""

    labels: Mapping[int, frozenset[int]]

    def score(self, evaluation: Evaluation) -> RealScore:
        """Count the correct predictions of an ImageNet-1k classifier. Raises DataError if no image has a label."""
        images = top1 = top5 = 0
        for i, classes in zip(evaluation.ids.tolist(), evaluation.predictions.tolist(), strict=True):
            right = self.labels[i]
            if right:
                images, top1, top5 = images + 1, top1 + (classes[0] in right), top5 + (not right.isdisjoint(classes))
        if not images:
            raise DataError("none of the images has a label in ImageNet-ReaL", "leave out --real for these few images")
        return RealScore(images, top1, top5)


def open_real_labels(index: ShardIndex, *, num_classes: int) -> RealLabels:
    """Return the reassessed labels of every sample, for a model of `num_classes`.

    Raises ConfigError unless the classes are ImageNet's 1,000 in their order, DataError for a sample that is not from
    ImageNet's validation set.
    """
    synsets = tuple(ImageNetInfo().label_names())
    if num_classes != len(synsets) or (index.classes and index.classes != synsets):
        what = f"the model has {num_classes:,}" if num_classes != len(synsets) else "the shards name others"
        raise ConfigError(
            f"--real needs ImageNet's 1,000 classes, and {what}",
            "leave out --real, or name ImageNet's validation shards",
        )
    table = RealLabelsImagenet(range(_IMAGES)).real_labels  # timm's table only: its scoring needs the files' order
    return RealLabels({i: frozenset(table[_file_name(index, i)]) for i in range(len(index))})


def _file_name(index: ShardIndex, i: int) -> str:
    found = _FILE.search(index.key(i))
    if found is None or not 1 <= int(found[0][-8:]) <= _IMAGES:
        raise DataError(
            f"{sample_name(index, i)} is no image of ImageNet's validation set: its key has no ILSVRC2012_val_ number",
            "leave out --real, or write the shards from files that keep their ImageNet names (tools/make_shards.py)",
        )
    return f"{found[0]}.JPEG"
