"""Photographs with masks of class numbers, as ADE20k has them: a folder of images, and masks of the same names.

    find_pairs -> Pair -> read_pair -> pixels uint8 [3, H, W], classes uint8 [H, W]; a DataError names what is wrong

H, W the sides of a photograph
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from maedistill.data.images.decode import BadImage, damage_as_bad_image, decode_rgb, open_image
from maedistill.durable import require_local
from maedistill.errors import ConfigError, DataError

A = TypeVar("A")
B = TypeVar("B")
_ENDINGS = {"images": (".jpg", ".jpeg", ".png"), "masks": (".png",)}


class Pair(NamedTuple):
    """A photograph and its mask."""

    image: Path
    mask: Path


def find_pairs(images: Path, masks: Path, *, prefix: str = "") -> list[Pair]:
    """Return the images of a folder, sorted by name, each with its mask. prefix: of the options' names, for errors.

    Raises DataError for an image without mask or a mask without image, since images would be left out silently.
    """
    pictures, drawn = (
        _files(folder, f"--{prefix}{kind}", endings)
        for folder, (kind, endings) in zip((images, masks), _ENDINGS.items(), strict=True)
    )
    if alone := sorted(pictures.keys() ^ drawn.keys()):
        where = (pictures | drawn)[alone[0]], masks if alone[0] in pictures else images
        raise DataError(
            f"{len(alone):,} files have no counterpart of the same name, first {where[0]}: none in {where[1]}",
            "give each image a mask NAME.png, with the same letters before the ending; move the others elsewhere",
        )
    return [Pair(pictures[stem], drawn[stem]) for stem in sorted(pictures)]


def read_pair(pair: Pair, *, num_classes: int | None, ignore: int) -> tuple[Tensor, Tensor]:
    """Return pixels uint8 [3, H, W] and class numbers uint8 [H, W]. num_classes: None for any number.

    Raises DataError for files that cannot be decoded, of different sizes, or with other masks than of class numbers.
    """
    file = pair.image
    try:
        pixels = decode_rgb(file.read_bytes())
        file = pair.mask
        data = file.read_bytes()
        with damage_as_bad_image(), open_image(data, formats=("PNG",)) as mask:
            if not (mask.mode in ("P", "1") or (mask.mode == "L" and data[24] == 8)):  # Pillow scales 2 and 4 bits
                raise DataError(
                    f"{file} has pixels of mode {mask.mode} with {data[24]} bits, not class numbers",
                    "write masks of one channel of 8 bits (mode L or P), whose values are the class numbers",
                )
            classes = torch.from_numpy(np.array(mask, dtype=np.uint8))
    except (BadImage, OSError) as error:
        raise DataError(f"{file} cannot be decoded ({error})", "repair it, or remove it and its partner") from error
    if classes.shape != pixels.shape[1:]:
        sizes = [f"{width} x {height}" for height, width in (classes.shape, pixels.shape[1:])]
        raise DataError(
            f"{pair.mask} has {sizes[0]} pixels and {pair.image} has {sizes[1]}",
            "write both in one size, as the file is stored: EXIF rotation is not applied",
        )
    known = classes[classes != ignore]
    if not len(known):
        raise DataError(
            f"{pair.mask} has only the value {ignore}, which is not a class",
            "move it and its image elsewhere, or name another number with --ignore",
        )
    if num_classes is not None and known.max() >= num_classes:
        raise DataError(
            f"{pair.mask} has class {known.max()}, but there are {num_classes} classes, 0 to {num_classes - 1}",
            "give their number with --classes, or the number that is not a class with --ignore",
        )
    return pixels, classes


def read_ahead(work: Callable[[A], B], items: Iterable[A], *, threads: int) -> Iterator[B]:
    """Yield `work(item)` of each item, in order, computed by threads that stay a few items ahead."""
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _files(folder: Path, flag: str, endings: tuple[str, ...]) -> dict[str, Path]:
    """Return the visible files of a folder with these endings, by name without ending."""
    require_local(folder, flag)
    if not os.path.isdir(folder):  # Path.is_dir raises errors of long names and of permissions
        raise ConfigError(f"{flag}: {folder} is not a folder", "correct the path")
    try:
        files = [path for path in folder.iterdir() if path.suffix.lower() in endings and path.name[0] != "."]
    except OSError as error:
        raise DataError(f"{flag}: {folder} cannot be read ({error.strerror})", "correct its permissions") from error
    named = {path.stem: path for path in files}
    if not files or len(named) < len(files):
        problem = "two files of one name" if files else f"no {' or '.join(endings)}"
        raise DataError(
            f"{flag}: {folder} holds {problem}",
            "name the folder that holds the files themselves, one for each image, e.g. annotations/training",
        )
    return named
