"""List the images of a data source: an image folder, CIFAR-10, ImageNet's archives or scikit-learn's digits.

    open_source("photos" | "cifar10" | "imagenet" | "digits") -> Source: records per split, class names, read(record)

No image file is decoded here. A record's key is the sample's permanent name: a number, or a path made safe for a tar.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, ImageNet

from maedistill.data.images.decode import BadImage, encode_png
from maedistill.data.shards.scan import NO_LABEL
from maedistill.errors import ConfigError, DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}  # folder -> split
LARGEST_FILE = 1 << 30  # bytes; no image of a real data set is that large
LONGEST_KEY = 80  # characters; a plain tar header holds names of up to 100
CIFAR10_VALIDATION, DIGITS_VALIDATION = 5_000, 797  # images
DIGITS_SIZE = 32  # pixels; the scans have 8


class Record(NamedTuple):
    """One image that will be written as a sample."""

    key: str
    label: int  # NO_LABEL if unlabelled
    origin: str  # the file's path relative to the source's folder, or the row in its array


@dataclass(frozen=True)
class Source:
    """The images of each split, not yet read. The index stores their provenance."""

    provenance: dict[str, Any]
    classes: tuple[str, ...]
    splits: dict[str, list[Record]]
    read: Callable[[Record], bytes]


def open_source(source: str, *, root: str | None = None, val_fraction: float = 0.0) -> Source:
    """List a source. A data set's name takes precedence over a folder of that name; write `./digits` for the folder.

    `root` is where torchvision finds the data set's files (or downloads them to, for CIFAR-10). `val_fraction` is the
    share to hold out of a folder without splits. Raise `ConfigError` or `DataError`.
    """
    if root is not None and source not in ("cifar10", "imagenet"):
        raise ConfigError(
            f"--root has no meaning for {source!r}", "--root goes with cifar10 and imagenet; leave it out"
        )
    named = {"cifar10": lambda: _open_cifar10(root), "imagenet": lambda: _open_imagenet(root), "digits": _open_digits}
    if source not in named:
        return open_folder(Path(source), val_fraction=val_fraction)
    if val_fraction:
        raise ConfigError(f"{source} has a fixed validation split", "leave --val-fraction out")
    return named[source]()


def open_folder(folder: Path, *, val_fraction: float = 0.0) -> Source:
    """List a folder of `class/image` or of plain images, directly or below the folders of SPLITS. Sort the classes.

    Raise `ConfigError` if a split's folder lies beside other folders, or if two folders mean the same split, because
    images would otherwise be left out silently.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is neither a folder nor cifar10, imagenet or digits", "correct the path")
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"--val-fraction is {val_fraction}", "give a share from 0 to 1, e.g. 0.1")
    names = _split_names(folder)  # names of the splits' folders
    if names and val_fraction:
        raise ConfigError(f"{folder} has its own splits: {', '.join(names)}", "leave --val-fraction out")
    files = {name: _list_images(folder / name) for name in names or ("",)}
    classes = _class_names(folder, files)
    splits = {SPLITS.get(name, "train"): _records(name, paths, classes) for name, paths in files.items()}
    if val_fraction:  # by the hash of the key, so that every machine makes the same split
        ranked = sorted(
            splits["train"], key=lambda record: hashlib.sha256(f"validation/{record.key}".encode()).digest()
        )
        count = max(1, round(val_fraction * len(ranked)))
        splits = {"train": ranked[count:], "val": ranked[:count]}
    provenance = {"source": "folder", "name": folder.resolve().name, "val_fraction": val_fraction}
    return Source(provenance, classes, splits, lambda record: _read_file(folder / record.origin))


def _split_names(folder: Path) -> list[str]:
    """Return the folders of SPLITS that exist, in that order; an empty list if the images are not split."""
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = [name for name in SPLITS if name in inside]
    others = [name for name in inside if name not in SPLITS]
    if names and others:
        raise ConfigError(
            f"{folder} holds {names[0]}, a split, beside {others[0]}, which is none",
            f"put classes below {', '.join(SPLITS)}, or name one of them alone",
        )
    if len({SPLITS[name] for name in names}) < len(names):
        raise ConfigError(f"{folder} holds {' and '.join(names)}: two mean one split", "keep one of them")
    return names


def _list_images(folder: Path) -> list[str]:
    """List the image paths below `folder`, sorted, with forward slashes. Skip hidden files and folders; follow links.

    Raise `DataError` if there is none, or for a link to a folder above it, which would list images without end.
    """
    images = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (os.path.join(parent, name) for name in folders):
            if os.path.islink(path) and Path(os.path.realpath(parent)).is_relative_to(os.path.realpath(path)):
                raise DataError(f"{path} is a link to a folder above it", "remove the link")
        files = (name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        images += [(Path(parent).relative_to(folder) / name).as_posix() for name in files]
    if not images:
        raise DataError(f"{folder} holds no images", f"images are files that end in {', '.join(SUFFIXES)}")
    return sorted(images)


def _class_names(folder: Path, files: dict[str, list[str]]) -> tuple[str, ...]:
    """Return the class folders of the first split (train, if there is one); empty if its images are in no folder."""
    classes = {}
    for split, paths in files.items():
        flat = [path for path in paths if "/" not in path]
        if 0 < len(flat) < len(paths):
            raise DataError(
                f"{folder}: {len(flat)} images lie beside the class folders, first {flat[0]!r}",
                "move them into a class folder or away; without any class folder the images are unlabelled",
            )
        classes[split] = {path.split("/")[0] for path in paths if "/" in path}
    first = next(iter(classes))
    for split, names in classes.items():
        if foreign := names - classes[first]:
            raise DataError(
                f"{folder / split} has the class {min(foreign)!r}, which is missing from {first} ({len(foreign)} such)",
                "give all splits the same class folders",
            )
    return tuple(sorted(classes[first]))


def _records(split: str, paths: list[str], classes: tuple[str, ...]) -> list[Record]:
    """Return records with unique keys: where paths share a key (`a.jpg`, `a.png`), append a hash of the path."""
    label_of = {name: label for label, name in enumerate(classes)}
    keys, records = list(map(_safe_key, paths)), []
    count = Counter(keys)
    for key, path in zip(keys, paths, strict=True):
        label = label_of[path.split("/")[0]] if "/" in path else NO_LABEL
        unique = key if count[key] == 1 else f"{key}-{_short_hash(path)}"
        records.append(Record(unique, label, f"{split}/{path}" if split else path))
    return records


def _safe_key(path: str) -> str:
    """Map `n01440764/n01440764_10026.JPEG` to n01440764_10026, `cat/A 1.jpg` to cat_A_1; end a long key in a hash."""
    *folders, name = path.split("/")
    stem = name.rpartition(".")[0]
    if folders and not stem.startswith(folders[-1] + "_"):
        stem = "_".join([*folders, stem])
    key = re.sub(r"[^A-Za-z0-9_-]", "_", stem)
    return key if len(key) <= LONGEST_KEY else f"{key[:LONGEST_KEY]}-{_short_hash(path)}"


def _short_hash(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:8]


def _read_file(path: Path) -> bytes:
    """Read a file. Raise `BadImage` for a pipe or device, which may never end, or a file too large for memory."""
    if not path.is_file():
        raise BadImage("it is no file" if path.exists() else "there is no such file")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise BadImage(f"{size:,} bytes, more than {LARGEST_FILE:,}")
    return path.read_bytes()


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
    folder = root or str(Path.home() / ".cache" / "maedistill" / "cifar10")
    try:
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
