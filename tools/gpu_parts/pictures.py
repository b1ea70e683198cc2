"""Shards of synthetic images: small ones of coarse noise, or ones with the dimensions and file size of photographs."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards

CLASSES = "abc"


def small_shards(folder: Path) -> Path:
    """Write train-*.tar with 96 images of 32 px, and val-*.tar with 24."""
    return _write(folder, {"train": 96, "val": 24}, side=(32, 32), suffix="png", detail=0, each=24)


def photo_shards(folder: Path, count: int, *, side: tuple[int, int]) -> Path:
    """Write train-*.tar with `count` JPEGs. side: height and width."""
    return _write(folder, {"train": count}, side=side, suffix="jpg", detail=12, each=max(16, count // 8))


def _write(
    folder: Path, counts: dict[str, int], *, side: tuple[int, int], suffix: str, detail: float, each: int
) -> Path:
    """Write images, then shards of `each` images. detail: strength of fine noise, which sets the size of a JPEG."""
    pictures, out = folder / "pictures", folder / "shards"

    def draw(split: str, number: int) -> None:
        draws = np.random.default_rng([number, split == "val"])
        coarse = draws.integers(0, 256, (max(2, side[0] // 8), max(2, side[1] // 8), 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize(side[::-1], Image.Resampling.BICUBIC), dtype=np.float32)
        image = image + draws.normal(0, 1, image.shape).astype(np.float32) * detail
        file = pictures / split / CLASSES[number % len(CLASSES)] / f"{number:05d}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        options = {"quality": 90} if suffix == "jpg" else {}
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, **options)

    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        for split, count in counts.items():
            list(pool.map(lambda number, split=split: draw(split, number), range(count)))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # hide the progress bar
        make_shards(open_folder(pictures), out, images_per_shard=each, workers=workers)
    return out
