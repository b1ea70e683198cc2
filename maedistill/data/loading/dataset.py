"""A map-style torch Dataset in place of shards: the same exact order, crops, restarts and counts.

    ImageDataset -> open_dataset -> DatasetIndex -> open_reader -> DatasetReader: item i -> uint8 [3, H, W]

torchvision's data sets fit as they are (`CIFAR10`, `ImageFolder`, ...), without a random transform.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from maedistill.data.images.decode import BadImage, to_rgb
from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.reader import ShardReader
from maedistill.data.shards.scan import NO_LABEL
from maedistill.errors import ConfigError, DataError

_PROBED = 8  # items whose pixels are part of the fingerprint


@runtime_checkable
class ImageDataset(Protocol):
    """Images by number. `dataset[i]` is the same image at every call, in every process: crops are drawn from it.

    An item is a PIL image, a tensor uint8 [3, H, W] or [1, H, W], or an array uint8 [H, W, 3] or [H, W]; or a tuple
    that begins with one. Labels come from an attribute `targets`, a list of whole numbers from 0 (-1: none), and names
    of classes from an attribute `classes`, as in torchvision. Without `targets` there are no labels.

    An item that raises OSError, ValueError or SyntaxError (a damaged file) is a bad sample: it is replaced by another,
    counted and named, as in shards. Any other exception ends the run.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any: ...


@dataclass(frozen=True, eq=False)
class DatasetIndex(ShardIndex):
    """The index of a Dataset: one shard without bytes, in which sample i is item i."""

    dataset: ImageDataset | None = None

    def sample_name(self, i: int) -> str:
        """Return the name of sample `i` for error messages: `NAME[i]`."""
        return f"{self.shards[0]}[{i}]"

    def fingerprint(self) -> str:
        """Return a hex digest of the number of items, the labels, and the pixels of a few items."""
        digest = hashlib.sha256(f"{len(self)}".encode() + self.labels.tobytes())
        reader = DatasetReader(self)
        for i in np.unique(np.linspace(0, len(self) - 1, _PROBED, dtype=np.int64)).tolist():
            try:
                digest.update(reader.decoded(i).numpy().tobytes())
            except BadImage:
                digest.update(b"bad")
        return digest.hexdigest()

    def require_labels(self) -> None:
        """Raise `DataError` unless every sample has a label."""
        if bare := int((self.labels == NO_LABEL).sum()):
            raise DataError(
                f"{bare:,} of {len(self):,} items of {self.shards[0]} have no label",
                "give the data set an attribute `targets`: a list of one whole number from 0 for each item",
            )


def open_dataset(dataset: ImageDataset, name: str) -> DatasetIndex:
    """Return the index of a Dataset. name: for messages, MODULE.CLASS.

    Raises ConfigError for an object that is no data set of this kind, DataError if it is empty.
    """
    if not isinstance(dataset, ImageDataset):
        raise ConfigError(f"{name} has no length or no items by number", "give a map-style torch Dataset")
    count = len(dataset)
    if not count:
        raise DataError(f"{name} is empty", "give a data set that holds images")
    labels = _labels(getattr(dataset, "targets", None), count, name)
    keys = [str(i).encode() for i in range(count)]
    nothing = np.zeros(count, np.int64)
    return DatasetIndex(
        shards=(name,),
        shard_bytes=(0,),
        shard_sha256=("",),
        starts=np.array([0, count], np.int64),
        offsets=nothing,
        sizes=nothing,
        labels=labels,
        classes=tuple(map(str, getattr(dataset, "classes", ()))),
        key_text=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        dataset=dataset,
    )


def _labels(targets: Any, count: int, name: str) -> np.ndarray:
    """Return the labels of a Dataset, int64 [count]. Raise `DataError` unless `targets` are whole numbers from -1."""
    try:
        given = np.full(count, NO_LABEL) if targets is None else np.asarray(targets)
    except (ValueError, TypeError):  # such as lists of several lengths
        given = np.empty((), object)
    least = given.min() if given.size and given.dtype.kind in "iub" else None
    if given.shape != (count,) or least is None or least < NO_LABEL:
        raise DataError(
            f"{name} has {count:,} items, but its `targets` have the type {given.dtype}, the shape "
            f"{given.shape} and the smallest value {least}",
            "give one whole number from 0 for each item, or -1 for no label",
        )
    return given.astype(np.int64)


class DatasetReader(ShardReader):
    """Reads items of a Dataset. It works in a forked process: the data set is shared with the training process."""

    def decoded(self, i: int, decode: Callable[[bytes], Any] | None = None) -> Any:
        """Return item `i`, uint8 [3, H, W]. decode: not used, as an item is decoded. Raise `BadImage` for a bad one."""
        assert isinstance(self.index, DatasetIndex) and self.index.dataset is not None
        self.on_read(i, False)
        try:
            item = self.index.dataset[i]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BadImage(f"{type(error).__name__}: {error}") from error
        return _pixels(item[0] if isinstance(item, tuple | list) else item, self.index.sample_name(i))


def open_reader(index: ShardIndex) -> ShardReader:
    """Return the reader of an index, of shards or of a Dataset."""
    return DatasetReader(index) if isinstance(index, DatasetIndex) else ShardReader(index)


def _pixels(image: Any, name: str) -> Tensor:
    """Convert an item to uint8 [3, H, W], with the pixels that its file has in shards.

    Raise `DataError` for anything that is no image, `BadImage` for one that is damaged.
    """
    if isinstance(image, Image.Image):
        return vision.pil_to_tensor(to_rgb(image, b""))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        image = torch.from_numpy(np.ascontiguousarray(image if image.ndim == 3 else image[..., None])).permute(2, 0, 1)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] in (1, 3):
        return image.expand(3, -1, -1)
    found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor | np.ndarray) else type(image).__name__
    raise DataError(
        f"{name} is {found}, not an image",
        "return a PIL image, or uint8: a tensor [3, H, W] or an array [H, W, 3]; crops and normalisation follow",
    )
