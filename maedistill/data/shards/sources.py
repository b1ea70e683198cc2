"""List the images of a data source: an image folder, CIFAR-10, ImageNet's archives or scikit-learn's digits.

    open_source("photos" | "cifar10" | "imagenet" | "digits") -> Source: records per split, class names, read(record)

No image file is decoded here. A record's key is the sample's permanent name: a number, or a path made safe for a tar.
Folders are listed in `folders.py`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, ImageNet

from maedistill.data.images.convert import encode_png
from maedistill.data.remote.user_cache import make_user_cache, user_cache
from maedistill.data.shards.folders import open_folder
from maedistill.data.shards.records import Record, Source
from maedistill.errors import ConfigError, DataError

CIFAR10_VALIDATION, DIGITS_VALIDATION = 5_000, 797  # images
DIGITS_SIZE = 32  # pixels; the scans have 8


def open_source(
    source: str, *, root: str | None = None, val_fraction: float = 0.0, val_labels: str | None = None
) -> Source:
    """List a source. A data set's name takes precedence over a folder of that name; write `./digits` for the folder.

    `root` is where torchvision finds the data set's files (or downloads them to, for CIFAR-10). `val_fraction` and
    `val_labels` are for folders, see `open_folder`. Raise `ConfigError` or `DataError`.
    """
    if root is not None and source not in ("cifar10", "imagenet"):
        raise ConfigError(f"--root cannot be used with {source!r}", "--root is for cifar10 and imagenet; leave it out")
    named = {"cifar10": lambda: _open_cifar10(root), "imagenet": lambda: _open_imagenet(root), "digits": _open_digits}
    if source not in named:
        return open_folder(Path(source), val_fraction=val_fraction, val_labels=val_labels)
    if val_fraction or val_labels:
        flag = "--val-fraction" if val_fraction else "--val-labels"
        raise ConfigError(f"{source} has a fixed validation split", f"leave {flag} out")
    return named[source]()


def _open_imagenet(root: str | None) -> Source:
    """Let torchvision check and unpack the user's archives, then list the folder. Classes are WordNet ids."""
    if root is None:
        raise ConfigError(
            "imagenet needs --root DIR", "DIR holds ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_{train,val}.tar"
        )
    try:
        for split in ("train", "val"):
            ImageNet(root, split=split)
    except (OSError, RuntimeError, ModuleNotFoundError) as error:  # torchvision needs scipy to read the devkit
        raise DataError(
            f"torchvision cannot prepare ImageNet in {root}: {error}",
            "put ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar there "
            "(image-net.org, after signing in), and pip install scipy",
        ) from error
    return replace(open_folder(Path(root)), provenance={"source": "imagenet"})


def _open_cifar10(root: str | None) -> Source:
    """Split CIFAR-10 into 45,000 train and 5,000 val images by `smallest_hashes`; the 10,000 test images are `test`."""
    folder = root or str(user_cache() / "cifar10")
    try:
        if root is None:
            make_user_cache()
        train, test = (CIFAR10(folder, train=is_train, download=True) for is_train in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-10 is not in {folder} and could not be downloaded: {error}",
            f"put cifar-10-python.tar.gz from {CIFAR10.url} into a folder and name it with --root",
        ) from error
    images = np.concatenate([train.data, test.data])  # [60000, 32, 32, 3]
    labels = [*train.targets, *test.targets]
    return _array_source("cifar10", train.classes, images, labels, len(train.data), CIFAR10_VALIDATION)


def _open_digits() -> Source:
    """Upscale 1,797 scans of 8 x 8 pixels with 17 gray levels to 32 x 32 RGB; 797 of them are the validation split."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ConfigError("digits needs scikit-learn", "pip install scikit-learn, or maedistill[demo]") from error
    scans = load_digits()
    shades = (scans.images * 255 / 16).round().astype(np.uint8)  # [1797, 8, 8]
    size = (DIGITS_SIZE, DIGITS_SIZE)
    enlarged = (Image.fromarray(scan).resize(size, Image.Resampling.BICUBIC).convert("RGB") for scan in shades)
    images = np.stack(list(map(np.asarray, enlarged)))  # [1797, 32, 32, 3]
    return _array_source("digits", "0123456789", images, scans.target, len(images), DIGITS_VALIDATION)


def _array_source(
    name: str, classes: Sequence[str], images: np.ndarray, labels: Sequence[int], num_train: int, num_validation: int
) -> Source:
    """Split images in memory, uint8 [n, H, W, 3]: rows below `num_train` become train and val, the others test.

    A key is the image's number in its part of the data set (train or test), so train and val share no key.
    """
    validation = smallest_hashes(images[:num_train], num_validation)
    train, test = np.setdiff1d(np.arange(num_train), validation), np.arange(num_train, len(images))
    splits = {
        split: [Record(f"{row - first:06d}", int(labels[row]), str(row)) for row in rows.tolist()]
        for split, rows, first in (("train", train, 0), ("val", validation, 0), ("test", test, num_train))
        if len(rows)
    }
    provenance = {"source": name, "validation": f"{num_validation} smallest sha256 of RGB bytes"}
    return Source(
        provenance, tuple(classes), splits, lambda record: encode_png(Image.fromarray(images[int(record.origin)]))
    )


def smallest_hashes(images: np.ndarray, count: int) -> np.ndarray:
    """Return the rows of the `count` images with the smallest sha256 of their raw bytes, in ascending order.

    `images` is uint8 [n, H, W, 3], hashed in the order row, column, channel; the result is int64 [count]. The rule uses
    neither labels nor order, so anyone with the images gets the same validation split.
    """
    digests = [hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest() for image in images]
    return np.sort(sorted(range(len(images)), key=digests.__getitem__)[:count])  # [count]
