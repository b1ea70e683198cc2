"""A tiny ImageNet: a few pictures with the names of its classes and of its validation images."""

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards

SYNSETS = ImageNetInfo().label_names()


def make_imagenet(folder, labels, numbers) -> str:
    """Shards of pictures of 4 px in the folders of some classes, named as ImageNet's validation images."""
    draws = np.random.default_rng(0)
    for label, number in zip(labels, numbers, strict=True):
        path = folder / "val" / SYNSETS[label] / f"ILSVRC2012_val_{number:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (4, 4, 3), np.uint8)).save(path)
    make_shards(open_folder(folder), folder / "shards")
    return str(folder / "shards/val-*.tar")
